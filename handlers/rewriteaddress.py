"""Rewrite addresses: what the devices of a house use becomes a real one.

    [handler rewriteaddress]
    enabled=true
    from scanner@home.lan=office@example.org
    to root=me@example.org, you@example.org

A sender changes in envelope and From header. Of several recipients only the
named ones change. Upper and lower case are the same.
"""
import re
from configparser import ConfigParser

from MailHandler import MailHandler

ADDRESS = r'[^\s<>,@]+@[^\s<>,@]+'
RULE = re.compile('from +[^ ]+={0}|to +[^ ]+={0}( *, *{0})*'.format(ADDRESS))


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
            self.logger.error('[handler rewriteaddress] stays off: wrong: '
                              + ', '.join(wrong or ['enabled=' + switch]))
        self.new = {tuple(key.lower().split()): value.replace(',', ' ').split()
                    for key, value in rules.items()}

    def handleMessage(self, message, mail, callback):
        from email.utils import getaddresses
        for new in self.new.get(('from', mail.frm.lower()), []):
            callback.setFrom(new)
        old = [address.lower() for address in mail.to]
        to = [str(new) for address in mail.to
              for new in self.new.get(('to', address.lower()), [address])]
        to = list(dict.fromkeys(to))    # each gets the mail once
        if [address.lower() for address in to] == old:
            return True
        shown = getaddresses(map(str, message.get_all('To', [])))
        if sorted(address.lower() for _, address in shown) == sorted(old):
            callback.setTo(', '.join(to))
        else:       # Cc or a blind copy, which the header must not tell
            mail.to = to
        return True
