"""The base class of mail handlers, and the manual for those who write one.

A handler sees every mail before it is sent. It may read it, change it,
readdress it, or discard it. A complete handler, say `handlers/camera.py`:

    from MailHandler import MailHandler

    class Camera(MailHandler):
        def isEnabled(self):
            return True
        def setLogger(self, logger):
            self.logger = logger
        def handleMessage(self, message, mail, callback):
            if mail.frm == 'camera@home.lan':
                callback.setTo('me@example.org')
            return True

At start, in the main thread
    Every module handlers/*.py is imported, in alphabetical order, and its
    class derived from MailHandler is made, without arguments. Then come
    setLogger, setConfig and isEnabled, in this order. A module that fails
    here is named in the log and skipped; the others work. Import `email` and
    other large modules inside the methods that need them: boxes are small.

Neighbours
    `import camera` finds handlers/camera.py, behind all modules of Python.
    A module without such a class is a helper for others: it is named in the
    log at level INFO. SIGHUP reads all of them anew.

For each mail, in the relay thread
    handleMessage of each enabled handler, in the same order, one mail at a
    time, before the mail's account is looked up. Each handler gets the mail
    as the one before left it. A slow handler delays all other mail, so give
    whatever it waits for a time limit.

Once a mail - or twice
    The result is saved before the mail is sent, so a retry, even after a
    restart, runs no handler again. Only a crash in between can: a handler
    must bear to see the same mail twice.

What may be changed, and how
    callback.setTo(string)      the To header and the envelope's recipients;
                                several are separated by commas
    callback.setFrom(string)    the From header and the envelope's sender
    mail.to = [address, ...]    the recipients only, the headers stay
    mail.frm = address          the sender only, the headers stay
    mail.msg = bytes            the whole mail, header and body
    Changing `message` alone changes nothing. Assign it: first
    `mail.msg = message.as_bytes()`, then call setTo or setFrom.

Addresses
    mail.frm and the elements of mail.to are bare ('a@b') and equal both
    spellings, 'a@b' and '<a@b>'. The sender of a bounce is empty.

Settings
    The section [handler NAME] of the ini, NAME being the module's file name
    without .py. All its keys, `enabled` too, are the handler's own; they
    come in lower case, the values as they were written.

The logger
    debug, info, warning, error, critical, exception as in the module
    logging, and 1.x's log, logwarn, logerr, logdebug; each takes the text.
    What is critical is in the log even with level=NONE.
"""

import abc


class MailHandler(abc.ABC):
    """What smtpproxy calls; a handler defines the three abstract methods."""

    @abc.abstractmethod
    def isEnabled(self):
        """Return True if the handler shall see mail.

        It is asked after setLogger and setConfig.
        """

    @abc.abstractmethod
    def setLogger(self, logger):
        """Keep the logger; it is the handler's way to the log file."""

    def setConfig(self, config):
        """Take the keys of [handler NAME], a dict of str to str.

        Without such a section the dict is empty. What is wrong with the
        values may be returned as a list of str, each a sentence for the
        owner: the start and --check show them. Whether the handler is of
        use all the same is for isEnabled to say. Handlers without settings
        need not define this.
        """

    @abc.abstractmethod
    def handleMessage(self, message, mail, callback):
        """Handle one mail and say what becomes of it.

        `message` is the mail as an email.message.Message, `mail` has the
        envelope in `to` and `frm` and the bytes in `msg`, `callback` has
        setTo and setFrom.

        Return True: the mail goes on, to the next handler and out.
        Return False: it is discarded at once, which the log says.
        Anything else, or an exception, is logged and the mail goes on.
        """
