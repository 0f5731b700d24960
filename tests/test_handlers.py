"""Handlers: what plug-ins may do to a mail, and that none can lose one."""
import os
import shutil
import sys
import textwrap
import unittest
from unittest import mock

import smtpproxy
from tests.case import A, B, OTHER, SENDER, ProxyCase

NEW = 'new@example.org'

TEMPLATE = '''\
from MailHandler import MailHandler

class Example(MailHandler):
    def isEnabled(self):
        return True
    def setLogger(self, logger):
        self.logger = logger
    def handleMessage(self, message, mail, callback):
        self.logger.log('saw it')
'''

RETURN = '        return True\n'

OF_1_X = '''\
import os, re
import mlogging
from MailHandler import MailHandler

class SaveNewPhoneMessage(MailHandler):
    logger = None

    def __init__(self):
        pass

    def isEnabled(self):
        return True

    def setLogger(self, logger):
        self.logger = logger

    def handleMessage(self, message, mail, callback):
        if mail.frm != '<printer@home.lan>':
            self.logger.logerr('a stranger')
            return True
        if '<a@example.org>' in mail.to and mail.to[0] == '<a@example.org>':
            self.logger.log('Subject ' + message['subject'])
            self.logger.logwarn('rewritten')
            callback.setTo('New <new@example.org>')
            callback.setFrom('camera@home.lan')
        return True
'''


class HandlerCase(ProxyCase):
    """A program whose handlers/ is in the test's folder."""

    def setUp(self):
        super().setUp()
        for patch in (mock.patch.object(smtpproxy, 'HOME', self.folder),
                      mock.patch.object(sys, 'path', sys.path[:]),
                      mock.patch.dict(sys.modules)):
            patch.start()
            self.addCleanup(patch.stop)
        bytecode = mock.patch.object(sys, 'dont_write_bytecode', True)
        bytecode.start()
        self.addCleanup(bytecode.stop)

    def handler(self, body='return True', name='example'):
        """Writes handlers/NAME.py: handleMessage with this body."""
        self.module(TEMPLATE + textwrap.indent(body, ' ' * 8), name)

    def module(self, text, name='example'):
        self.write(os.path.join('handlers', name + '.py'), text)

    def through(self, body, to=(A,), **options):
        """One mail through a handler with this body, all anew; its id."""
        self.forget()
        self.handler(body)
        self.start(**options)
        return self.submit(to=to)

    def forget(self):
        """As if nothing had been before; the next row of a table."""
        self.stop()
        shutil.rmtree(self.path('msgs'), ignore_errors=True)
        self.upstream.mails.clear()
        self.write('smtpproxy.log', '')

    def runs(self):
        return self.log().count('saw it')


class Loading(HandlerCase):

    def test_handlers_run_in_alphabetical_order(self):
        for name in 'c', 'a', 'b', '_hidden':
            self.handler('self.logger.log("I am %s")\nreturn True' % name,
                         name)
        self.start()
        self.submit()
        self.assertDelivered([A])

        order = [line[-1] for line in self.log().splitlines()
                 if 'I am' in line]
        self.assertEqual(['a', 'b', 'c'], order)

    GOOD = TEMPLATE + RETURN
    # the file's text and what the log says about it
    BAD = {
        'syntax': ('def (', 'SyntaxError'),
        'imports': ('import no_such_module', 'no_such_module'),
        'raises': ('1 / 0', 'ZeroDivisionError'),
        'exits': ('raise SystemExit(3)', 'SystemExit'),
        'throws': ('raise type("Odd", (BaseException,), {})', 'Odd'),
        'lacks': (GOOD.replace('isEnabled', 'enabled'), 'isEnabled'),
        'needs': (GOOD.replace(
            'def isEnabled(self)', 'def __init__(self, more): pass\n    def '
            'isEnabled(self)'), '__init__'),
        'asks': (GOOD.replace('return True', 'return 1 / 0'),
                 'ZeroDivisionError')}

    def test_what_cannot_be_loaded_is_named_and_the_others_work(self):
        self.handler(name='works')
        for name, (text, _) in self.BAD.items():
            self.module(text, name)
        self.start()

        for name, (_, word) in self.BAD.items():
            with self.subTest(name):
                self.assertLogged('ERROR', 'handler ' + name, word)
        self.assertEqual(['works'], [
            entry[0] for entry in self.proxy.handlers.enabled])

    def test_a_base_of_their_own_is_no_handler(self):
        base, method = TEMPLATE.split('    def handleMessage')
        text = base + 'class Mine(Example):\n    def handleMessage' + (
            method + RETURN)
        self.module(text)
        self.module(text.replace('(Example)', '(MailHandler)'), 'unrelated')
        self.start()
        self.submit()
        self.assertDelivered([A])

        self.assertEqual(1, self.runs())
        self.assertLogged('ERROR', 'unrelated', 'handleMessage')

    def test_what_is_not_enabled_sees_no_mail_and_costs_nothing(self):
        self.module(TEMPLATE.replace('True', 'False') + RETURN)
        self.start()
        with mock.patch.object(smtpproxy.Mail, 'msg', property()):
            self.submit()
            self.assertDelivered([A])

        self.assertEqual(0, self.runs())

    def test_a_handler_gets_its_section_of_the_ini(self):
        text = TEMPLATE.replace('def isEnabled(self):', (
            'def setConfig(self, config):\n        self.config = config\n'
            '    def isEnabled(self):\n'
            '        self.logger.log(repr(sorted(self.config.items())))'))
        self.module(text + RETURN)
        self.start(more='[handler example]\nEnabled=Yes\ncolour=50% RED\n')

        self.assertLogged("[('colour', '50% RED'), ('enabled', 'Yes')]")

    def test_without_a_section_a_handler_gets_an_empty_dict(self):
        text = TEMPLATE.replace('def isEnabled(self):', (
            'def setConfig(self, config):\n        self.config = config\n'
            '    def isEnabled(self):\n'
            '        self.logger.log("keys %r" % self.config)'))
        self.module(text + RETURN)
        self.start()

        self.assertLogged('keys {}')

    def test_what_a_handler_says_of_its_section_is_in_the_log(self):
        text = TEMPLATE.replace('def isEnabled(self):', (
            'def setConfig(self, config):\n'
            '        return ["no key %s" % key for key in config]\n'
            '    def isEnabled(self):'))
        self.module(text + RETURN)
        self.start(more='[handler example]\ncolour=red\nsize=9\n')

        self.assertLogged('ERROR', 'handler example: no key colour')
        self.assertLogged('ERROR', 'handler example: no key size')

    def test_a_section_without_a_handler_is_named(self):
        self.start(more='[handler missing]\nenabled=true\n')

        self.assertLogged('ERROR', 'missing', 'handlers/missing.py')

    def test_a_section_for_what_is_no_handler_is_named(self):
        self.module('')
        self.start(more='[handler example]\nenabled=true\n')

        self.assertLogged('ERROR', 'handlers/example.py', 'no class')

    def test_no_folder_of_handlers_is_no_error(self):
        self.start()
        self.submit()

        self.assertDelivered([A])
        self.assertNotLogged('ERROR')


class Neighbours(HandlerCase):
    """With 1.x handlers/ was in the path of Python."""

    def through_a_neighbour(self, name, word='WORD'):
        """A mail through a handler that imports that module."""
        self.module('import %s\n' % name + TEMPLATE + (
            '        self.logger.log(str(%s.%s))\n' % (name, word)) + RETURN)
        self.start()
        self.submit()
        self.assertDelivered([A])

    def test_a_handler_may_import_its_neighbour(self):
        self.module('WORD = "from next door"', 'shared')

        self.through_a_neighbour('shared')

        self.assertLogged('from next door')
        self.assertLogged('INFO', 'handlers/shared.py is no handler')
        self.assertNotLogged('ERROR')

    def test_a_neighbour_that_is_a_handler_is_made_once(self):
        self.module(TEMPLATE.replace('saw it', 'once') + RETURN
                    + 'WORD = "both"', 'other')

        self.through_a_neighbour('other')

        self.assertLogged('both')
        self.assertEqual(1, self.log().count('once'))

    def test_none_takes_the_place_of_a_module_of_python(self):
        self.module('ONE_THIRD = "ours"', 'colorsys')

        self.through_a_neighbour('colorsys', 'ONE_THIRD')

        self.assertLogged('0.333')

    def test_a_reload_takes_a_changed_neighbour(self):
        self.module('WORD = "old"', 'shared')
        self.through_a_neighbour('shared')
        self.module('WORD = "quite new"', 'shared')

        self.proxy.reload()
        self.submit()

        self.assertLogged('quite new')


class Of1x(HandlerCase):

    def test_a_handler_of_1_x_works_unchanged(self):
        self.module(OF_1_X)
        self.start(accounts={SENDER: self.account(),
                             OTHER: self.account(localhostname='other')})
        id = self.submit(b'Subject: call\r\nTo: a@example.org\r\n\r\nhi\r\n')

        mail = self.assertDelivered([NEW])
        self.assertEqual((OTHER, 'other'), (mail.sender, mail.hello))
        self.assertIn(b'\r\nTo: New <new@example.org>\r\n', mail.data)
        self.assertIn(b'\r\nFrom: camera@home.lan\r\n', mail.data)
        self.assertLogged('INFO', id, 'example', 'Subject call')
        self.assertLogged('WARNING', id, 'rewritten')

    def test_addresses_equal_both_spellings(self):
        address = smtpproxy.Address('a@b')

        for same in ('a@b', '<a@b>', smtpproxy.Address('a@b')):
            with self.subTest(same):
                self.assertTrue(address == same and same == address)
                self.assertFalse(address != same or same != address)
                self.assertTrue(same in [address] and address in [same])
        self.assertNotEqual(address, 'a@c')
        self.assertNotEqual(address, None)
        self.assertEqual('a@b', str(address))

    def test_the_logger_has_the_names_of_1_x_and_of_logging(self):
        names = {'log': 'INFO', 'logerr': 'ERROR', 'logwarn': 'WARNING',
                 'logdebug': 'DEBUG', 'debug': 'DEBUG', 'info': 'INFO',
                 'warning': 'WARNING', 'error': 'ERROR', 'exception': 'ERROR',
                 'critical': 'CRITICAL'}
        id = self.through(''.join(
            'self.logger.%s("by %s: 100%%")\n' % (name, name)
            for name in names) + 'return True')
        self.assertDelivered([A])

        for name, level in names.items():
            with self.subTest(name):
                self.assertLogged(level, id, 'by %s: 100%%' % name)

    def test_what_is_critical_is_written_at_level_none(self):
        id = self.through('self.logger.error("small")\n'
                          'self.logger.critical("the house burns")\n'
                          'return True', accounts={
                              SENDER: self.account(),
                              'logging': {'level': 'NONE'}})
        self.assertDelivered([A])

        self.assertLogged('CRITICAL', id, 'the house burns')
        self.assertNotLogged('small')


class Verdicts(HandlerCase):

    def test_false_discards_and_the_log_says_so(self):
        id = self.through('return False')

        line = self.assertLogged('INFO', id, 'discarded', 'example')
        self.assertIn(SENDER, line)
        self.assertIn(A, line)
        self.assertSpooled(0)
        self.assertEqual([], self.upstream.mails)

    def test_anything_else_goes_on_with_a_word_in_the_log(self):
        for value in ('None', '0', '1', '""', '"False"', '[]', 'object()'):
            with self.subTest(value):
                self.through('return ' + value)
                self.assertDelivered([A])
                self.assertLogged('WARNING', 'returned')

    def test_no_exception_loses_a_mail(self):
        change = 'callback.setTo("new@example.org")\nmail.msg = b"no"\n'
        for error in ('ValueError("x\\ny")', 'SystemExit(1)', 'MemoryError',
                      'RecursionError', 'KeyboardInterrupt', 'StopIteration',
                      'UnicodeError', 'GeneratorExit', 'OSError(28, "full")'):
            with self.subTest(error):
                id = self.through(change + 'raise ' + error)
                mail = self.assertDelivered([A])
                self.assertIn(b'hello', mail.data)
                self.assertLogged('ERROR', id, 'example', 'failed')

    def test_the_next_handler_sees_what_the_one_before_made(self):
        self.handler('callback.setTo("%s")\nreturn True' % NEW, 'a')
        self.handler('self.logger.log("to %s and %s" % (mail.to, '
                     'message["to"]))\nreturn True', 'b')
        self.start()
        self.submit()

        self.assertDelivered([NEW])
        self.assertLogged("['%s'] and %s" % (NEW, NEW))

    def test_what_follows_a_failure_sees_the_mail_as_it_was(self):
        self.handler('mail.to.append("x@y")\nmail.frm = "z@y"\n1 / 0', 'a')
        self.handler('return True', 'b')
        self.start()
        self.submit()

        self.assertEqual(SENDER, self.assertDelivered([A]).sender)


class Changes(HandlerCase):

    # handleMessage's body, recipients and a piece of the mail as it arrives
    CHANGES = (
        ('mail.to = ["%s"]' % NEW, [NEW], b'hello'),
        ('mail.to = ("<%s>", "%s")' % (NEW, B), [NEW, B], b'hello'),
        ('mail.to.append("%s")' % NEW, [A, NEW], b'hello'),
        ('mail.msg = b"Subject: x\\n\\nnew\\n"', [A], b'new'),
        ('mail.msg = mail.msg.replace(b"hello", b".")', [A],
         b'\r\n.\r\n'),
        ('del message["subject"]\nmail.msg = message.as_bytes()',
         [A], b'hello'),
        ('mail.msg = message.as_string()', [A], b'hello'),
        ('callback.setTo("X <%s>, %s")' % (NEW, B), [NEW, B],
         b'\r\nTo: X <new@example.org>, b@example.org\r\n'))

    def test_what_a_handler_may_change(self):
        for body, to, text in self.CHANGES:
            with self.subTest(body):
                self.through(body + '\nreturn True')
                mail = self.assertDelivered(to)
                self.assertIn(text, mail.data)
                self.assertEqual([], self.upstream.violations)

    def test_a_new_sender_goes_out_by_its_own_account(self):
        for body in ('mail.frm = "<camera@home.lan>"',
                     'callback.setFrom("C <camera@home.lan>")'):
            with self.subTest(body):
                self.through(body + '\nreturn True', accounts={
                    OTHER: self.account(localhostname='other')})
                mail = self.assertDelivered([A])
                self.assertEqual((OTHER, 'other'), (mail.sender, mail.hello))

    def test_an_address_is_made_once_for_all_that_follows(self):
        """Its account is asked for the same string that is sent."""
        for body in ('mail.frm = "@relay:%s"', 'mail.frm = " %s "',
                     'mail.frm = "<@relay:%s>"'):
            with self.subTest(body):
                self.through(body % OTHER + '\nreturn True', accounts={
                    SENDER: self.account(),
                    OTHER: self.account(localhostname='other')})
                mail = self.assertDelivered([A])
                self.assertEqual((OTHER, 'other'), (mail.sender, mail.hello))

    def test_only_the_asked_header_changes(self):
        content = (b'Subject: =?utf-8?q?x?=\r\nTo: a@example.org,\r\n'
                   b' b@example.org\r\nX:\todd\r\nto: c\r\n\r\n'
                   b'To: body\xff\r\n')
        self.handler('callback.setTo("%s")\nreturn True' % NEW)
        self.start()
        self.submit(content)

        data = self.assertDelivered([NEW]).data
        self.assertTrue(data.endswith(
            b'Subject: =?utf-8?q?x?=\r\nX:\todd\r\nTo: new@example.org\r\n'
            b'\r\nTo: body\xff\r\n'), data)

    def test_a_string_of_recipients_is_not_taken_apart(self):
        self.through('mail.to = "%s"\nreturn True' % NEW)

        self.assertIn(self.upstream.wait()[0].to, ([NEW], [A]))

    # What must not do any harm, as handleMessage's body.
    EVIL = [line % r'x@y\r\nBcc: victim@example.org' for line in (
        'callback.setTo("%s")', 'callback.setFrom("%s")', 'mail.frm = "%s"',
        'mail.to = ["%s"]')] + [
        r'callback.setTo("\"x\r\nBcc: victim@z\" <x@y>")',
        r'mail.to = ["x@y>\r\nRCPT TO:<victim@z"]',
        'mail.to = ["x@y> <victim@z"]', 'mail.to = []', 'mail.to = [""]',
        'mail.to = ["x@y> ORCPT=rfc822;victim@z"]', "mail.to = ['\"x']",
        'mail.to = None', 'mail.frm = None', 'mail.msg = None',
        'callback.setTo("")', 'callback.setTo(None)']

    def test_nothing_is_injected_into_header_or_envelope(self):
        for body in self.EVIL:
            with self.subTest(body):
                self.through(body + '\nreturn True')
                mail = self.assertDelivered([A])
                self.assertEqual(SENDER, mail.sender)
                self.assertNotIn(b'victim', mail.data)
                self.assertIn(b'hello', mail.data)
                self.assertLogged('ERROR', 'failed')


class Once(HandlerCase):
    """What handlers made is saved before the mail is sent."""

    BODIES = {'changed': 'callback.setTo("%s")\nreturn True' % NEW,
              'seen only': 'return True'}

    def begin(self, body):
        """A mail that a handler saw and that could not be sent yet."""
        self.upstream.script['MAIL'] = '451 4.3.0 later'
        id = self.through(body)
        self.assertLogged(id, 'not delivered')
        self.upstream.script.clear()

    def test_a_retry_runs_no_handler_again(self):
        for name, body in self.BODIES.items():
            with self.subTest(name):
                self.begin(body)
                self.proxy.reload()
                self.upstream.wait()
                self.assertEqual(1, self.runs())

    def test_nor_does_a_restart(self):
        for name, body in self.BODIES.items():
            with self.subTest(name):
                self.begin(body)
                self.stop()
                self.start()
                self.upstream.wait()
                self.assertEqual(1, self.runs())

    def test_a_reload_takes_changed_handlers_for_new_mail(self):
        self.start()
        self.handler('return False')

        self.proxy.reload()
        self.assertLogged('reloaded')
        self.submit()

        self.assertLogged('discarded')
        self.assertEqual([], self.upstream.mails)


if __name__ == '__main__':
    unittest.main()
