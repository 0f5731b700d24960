"""Discard mail whose subject contains one of the given texts.

    [handler discardsubject]
    enabled=true
    contains=toner low | backup finished

Upper and lower case are the same. A discarded mail is gone.
"""
from configparser import ConfigParser

from MailHandler import MailHandler


class DiscardSubject(MailHandler):
    enabled = False

    def isEnabled(self):
        return self.enabled

    def setLogger(self, logger):
        self.logger = logger

    def setConfig(self, config):
        switch = config.get('enabled', 'false').lower()
        self.enabled = ConfigParser.BOOLEAN_STATES.get(switch)
        # An empty text is in every subject: it would discard all mail.
        self.texts = [' '.join(text.split()).casefold()
                      for text in config.get('contains', '').split('|')
                      if text.strip()]
        if (self.enabled is None or self.enabled and not self.texts
                or set(config) - {'enabled', 'contains'}):
            self.enabled = False
            return ['it stays off: it wants enabled=true and contains=text | '
                    'text, the section has %r' % (config,)]

    def handleMessage(self, message, mail, callback):
        subject = readable(message['Subject']).casefold()
        for text in self.texts:
            if text in subject:
                self.logger.info('discarded: %r is in the subject' % text)
                return False
        return True


def readable(header):
    """The text of a header on one line; raw 8-bit text is taken as UTF-8."""
    from email.errors import HeaderParseError
    from email.header import decode_header
    text = ''
    try:
        for part, charset in decode_header(header or ''):
            if isinstance(part, bytes):
                charset = (charset or '').replace('unknown-8bit', '')
                part = part.decode(charset or 'utf-8', 'replace')
            text += part
    except (HeaderParseError, LookupError, ValueError):
        text = str(header)      # a broken encoded word, an unknown charset
    return ' '.join(text.split())
