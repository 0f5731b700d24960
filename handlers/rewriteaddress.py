"""Rewrite addresses: what the devices of a house use becomes a real one.

    [handler rewriteaddress]
    enabled=true
    from scanner@home.lan=office@example.org
    to root=me@example.org, you@example.org
    to *@home.lan=me@example.org
    to *=archive@example.org

`*@home.lan` is every address of that domain, `*` is every address. The most
precise rule counts: the whole address, then its domain, then `*`. A sender
changes in envelope and From header; a mail without one (`<>`) stays as it is.
Of several recipients only those change for which there is a rule. Upper and
lower case are the same.
"""
import re
from configparser import ConfigParser

from MailHandler import MailHandler

ADDRESS = r'[^\s<>,@]+@[^\s<>,@]+'
PATTERN = r'(\*|\*@[^\s<>,@*]+|[^\s<>,@*]+(@[^\s<>,@*]+)?)'
RULE = re.compile('from +{1}={0}|to +{1}={0}( *, *{0})*'.format(
    ADDRESS, PATTERN))


class RewriteAddress(MailHandler):
    enabled = False

    def isEnabled(self):
        return self.enabled

    def setLogger(self, logger):
        self.logger = logger

    def setConfig(self, config):
        rules = {'enabled': 'false', **config}
        switch = rules.pop('enabled')
        self.enabled = ConfigParser.BOOLEAN_STATES.get(switch.lower())
        wrong = [rule for rule in map('='.join, rules.items())
                 if not RULE.fullmatch(rule)]
        if wrong or self.enabled is None:
            self.enabled = False
            return ['it stays off: wrong: %s; a rule is from or to, a blank, '
                    'a@b or *@b or *, and behind the = the new address'
                    % ', '.join(wrong or ['enabled=' + switch])]
        self.new = {tuple(key.lower().split()): value.replace(',', ' ').split()
                    for key, value in rules.items()}

    def rule(self, kind, address):
        """The new addresses in the place of address; [] if it stays."""
        address = address.lower()
        name, at, domain = address.rpartition('@')
        for pattern in address, at and '*@' + domain, address and '*':
            if (kind, pattern) in self.new:
                return self.new[kind, pattern]
        return []

    def handleMessage(self, message, mail, callback):
        from email.utils import getaddresses
        for new in self.rule('from', mail.frm):
            callback.setFrom(new)
        old = [address.lower() for address in mail.to]
        to = [str(new) for address in mail.to
              for new in self.rule('to', address) or [address]]
        to = list(dict.fromkeys(to))    # each gets the mail once
        if [address.lower() for address in to] == old:
            return True
        shown = getaddresses(map(str, message.get_all('To', [])))
        if sorted(address.lower() for _, address in shown) == sorted(old):
            callback.setTo(', '.join(to))
        else:       # Cc or a blind copy, which the header must not tell
            mail.to = to
        return True
