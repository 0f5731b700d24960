"""Save the voice messages that a telephone system mails, in a folder.

Keys of [handler savevoice]: enabled; folder, a full path; from, only mail of
this sender; subject, only if it contains this; types, of the attachments;
discard, true: a mail is not sent on once its attachments are saved.
"""
import os
import re
from configparser import ConfigParser
from fnmatch import fnmatch

from MailHandler import MailHandler

DEFAULTS = {'enabled': 'false', 'folder': '', 'from': '', 'subject': '',
            'types': 'audio/*', 'discard': 'false'}


class SaveVoice(MailHandler):
    enabled = False

    def setLogger(self, logger):
        self.logger = logger

    def isEnabled(self):
        return self.enabled

    def setConfig(self, config):
        self.config = {**DEFAULTS, **config}
        self.folder = self.config['folder']
        self.enabled, self.discard = (
            ConfigParser.BOOLEAN_STATES.get(self.config[key].lower())
            for key in ('enabled', 'discard'))
        if (set(config) - set(DEFAULTS) or None in (self.enabled, self.discard)
                or self.enabled and not os.path.isabs(self.folder)):
            self.enabled = False
            return ['it stays off: folder must be a full path, enabled and '
                    'discard true or false, other keys from, subject and '
                    'types; the section has %r' % (config,)]
        if self.enabled and not os.access(self.folder, os.W_OK | os.X_OK):
            # It stays on: the disk may be mounted later.
            return ['it cannot write to folder=' + self.folder]

    def handleMessage(self, message, mail, callback):
        if (self.config['from'].lower() not in ('', mail.frm.lower())
                or self.config['subject'].casefold()
                not in readable(message['Subject']).casefold()):
            return True
        voices = [part for part in message.walk() if self.is_voice(part)]
        try:
            for part in voices:
                kind = part.get_content_subtype().replace('x-', '')
                name = readable(part.get_filename('voice.' + kind))
                self.save(safe(name), part.get_payload(decode=True))
        except (OSError, ValueError) as error:  # disk, or a wild name
            self.logger.error('voice not saved, mail goes on: %s' % error)
            return True
        return not (voices and self.discard)

    def is_voice(self, part):
        kinds = self.config['types'].lower().replace(',', ' ').split()
        return not part.is_multipart() and any(
            fnmatch(part.get_content_type(), kind) for kind in kinds)

    def save(self, name, data):
        """Put data in the folder: whole, durable, over no other file.

        The check sum in the name keeps voices apart, and a second run for
        the same mail finds the file of the first.
        """
        stem, ext = os.path.splitext(os.path.join(self.folder, name))
        import hashlib      # five megabytes, so only for who has voice mail
        path = stem + '-' + hashlib.sha256(data).hexdigest()[:12] + ext
        try:
            with open(path + '.part', 'wb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + '.part', path)
        finally:
            if os.path.exists(path + '.part'):
                os.remove(path + '.part')
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.logger.info('voice saved: ' + path)


def safe(name):
    """A file name that does no harm in any folder, Windows shares included."""
    name = re.sub(r'[^\w .,()+@-]', '_', re.split(r'[/\\]', name)[-1])
    stem, ext = os.path.splitext(name.strip(' .-') or 'voice')
    # The check sum makes CON and its like harmless; 80 bytes leave room for
    # it in encrypted folders of some NAS, which take names of 143 bytes.
    return stem.encode()[:80].decode(errors='ignore') + ext[:8].strip()


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
