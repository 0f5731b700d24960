"""smtps.Delivery, the client's end of SMTP, against servers that follow a
script. No smtpproxy here: it is a library."""
import logging
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import unittest
from unittest import mock

import smtps
from tests.fakes import (
    DROP, EXTENSIONS, RESET, FakeSMTP, client_tls, server_tls, wait_until)

TOP = os.path.dirname(os.path.abspath(smtps.__file__))
SENDER, A, B, C = 'me@home.lan', 'a@x.org', 'b@x.org', 'c@x.org'
NAME = 'grüße@x.org'
STEPWISE = tuple(x for x in EXTENSIONS if x != 'PIPELINING')
HEADER, BODY = b'Subject: test\r\n', b'\r\nhello\r\n'


def envelope(*to, **parameters):
    return smtps.Envelope(SENDER, list(to) or [A], parameters)


def waiting(conversation):
    """What the client has sent behind the command that is being answered."""
    conversation.socket.settimeout(0)
    try:
        return conversation.file.peek()
    finally:
        conversation.socket.settimeout(None)


def refuse_in_the_middle(conversation):
    """An action at DATA: says so, and reads no more than it must."""
    conversation.say('354 go on')
    conversation.read_line()
    conversation.say('552 5.3.4 too large')
    conversation.socket.shutdown(1)
    while conversation.file.read(65536):
        pass                            # no reset that overtakes the reply
    raise ConnectionError('too large')


def refuse_and_reset(conversation):
    """The same, without a look at the rest."""
    conversation.say('354 go on')
    conversation.read_line()
    conversation.say('552 5.3.4 too large')
    RESET(conversation)


class DeliveryCase(unittest.TestCase):

    def serve(self, script=None, extensions=EXTENSIONS, **options):
        self.server = FakeSMTP(script, extensions=extensions, **options)
        self.addCleanup(self.server.close)
        return self.server

    def connect(self, *arguments, **options):
        """A delivery behind its hello(), to self.server."""
        delivery = smtps.Delivery(self.server.host, self.server.port,
                                  'box.home.lan', *arguments, **options)
        self.addCleanup(delivery.close)
        delivery.hello()
        return delivery

    def delivery(self, script=None, extensions=EXTENSIONS):
        self.serve(script, extensions)
        return self.connect()

    def assertSent(self, report, *to):
        """These have it, nobody else is left."""
        self.assertEqual(
            (sorted(to or (A,)), {}, {}, [], None),
            (sorted(report.sent), report.later, report.never, report.open,
             report.error))
        self.assertEqual([], self.server.violations)

    def verbs(self):
        return [line.split()[0].upper() for line in self.server.commands]


class ALibrary(unittest.TestCase):

    LISTENER = textwrap.dedent('''
        import sys
        import smtps
        class Keeper(smtps.Session):
            def data(self, sender, recipients, parameters):
                print('from', sender, 'to', recipients)
                return smtps.Message()
        server = smtps.Server(Keeper)
        server.listen('127.0.0.1', 0)
        server.start()
        print('smtplib' in sys.modules)
        ''')
    END = textwrap.dedent('''
        server.stop()
        print('smtplib' in sys.modules)
        print([name for name in sys.modules if name.lower() in (
            'smtpproxy', 'mailhandler', 'poplib', 'configparser')])
        ''')

    def example(self):
        """The one that delivers, in the docstring of smtps.py."""
        text = smtps.__doc__
        start = text.index('    delivery = ')
        text = textwrap.dedent(text[start:text.index('\nFor ', start)])
        return text.replace("'mail.example.org', 25", (
            "'127.0.0.1', server.listeners[0].getsockname()[1]"))

    def test_it_delivers_to_its_own_listener_without_the_program(self):
        """As the docstring shows; smtplib comes with the first delivery."""
        done = subprocess.run(
            [sys.executable, '-c', self.LISTENER + self.example() + self.END],
            stdout=subprocess.PIPE, cwd=TOP, check=True, timeout=30)

        lines = done.stdout.decode().splitlines()
        self.assertEqual(
            ['False', "from me@example.org to ['you@example.org']"],
            lines[:2])
        self.assertIn("sent {'you@example.org': '250 2.0.0 thank you'} later "
                      '{} never {}', lines[2])
        self.assertEqual(['True', '[]'], lines[3:])


class GettingThere(DeliveryCase):

    def test_what_is_offered_is_known_after_hello(self):
        self.serve(mechanisms=['PLAIN', 'LOGIN'])

        delivery = self.connect()

        self.assertEqual('PLAIN LOGIN', delivery.offers('AUTH').strip())
        self.assertEqual('', delivery.offers('pipelining'))
        self.assertIsNone(delivery.offers('starttls'))

    def test_helo_will_do(self):
        for script in {'EHLO': '502 5.5.1 what?'}, {'EHLO': '550 no'}:
            self.assertSent(self.delivery(script).send(
                envelope(), HEADER, BODY))

            self.assertEqual(['EHLO', 'HELO', 'MAIL'], self.verbs()[:3])

    def test_a_server_that_hangs_up_after_its_refusal_has_said_why(self):
        self.serve({'EHLO': '501 5.5.4 argument my_box invalid',
                    'HELO': DROP})

        with self.assertRaisesRegex(OSError, '^501 5.5.4 argument my_box'):
            self.connect()

    def test_tls_at_once_or_by_starttls(self):
        for implicit in True, False:
            with self.subTest(implicit=implicit):
                self.serve(tls=server_tls(), implicit=implicit)
                delivery = self.connect(client_tls() if implicit else None)
                if not implicit:
                    delivery.start_tls(client_tls())

                self.assertSent(delivery.send(envelope(), HEADER, BODY))

                self.assertIn('TLSv1', self.server.mails[0].tls)

    def test_each_step_is_told(self):
        for implicit, steps in (
                (True, ['name', 'connect', 'TLS', 'greeting']),
                (False, ['name', 'connect', 'greeting', 'TLS'])):
            with self.subTest(implicit=implicit):
                self.serve(tls=server_tls(), implicit=implicit)
                told = {}
                delivery = self.connect(client_tls() if implicit else None,
                                        watch=told.__setitem__)
                if not implicit:
                    delivery.start_tls(client_tls())

                self.assertEqual(steps, list(told))
                self.assertEqual(('127.0.0.1', ['127.0.0.1']), told['name'])
                self.assertEqual(self.server.address, told['connect'])
                self.assertEqual('fake ESMTP', told['greeting'])

    def found(self, *addresses):
        """What getaddrinfo says, of (address, port)."""
        return mock.patch('socket.getaddrinfo', return_value=[(
            socket.AF_INET6 if ':' in where[0] else socket.AF_INET,
            socket.SOCK_STREAM, 6, '', where) for where in addresses])

    def test_the_next_address_is_tried_where_one_leads_nowhere(self):
        server, closed = self.serve(), socket.socket()
        self.addCleanup(closed.close)
        closed.bind(('127.0.0.1', 0))

        with self.found(closed.getsockname(), server.address):
            self.assertSent(self.connect().send(envelope(), HEADER, BODY))

    def test_one_address_of_each_family_comes_first(self):
        v4, other_v4, v6 = ('192.0.2.1', 25), ('192.0.2.2', 25), ('::1', 25)
        refuse = mock.Mock(side_effect=ConnectionRefusedError)

        with self.found(v4, other_v4, v6), mock.patch(
                'smtps.connected', refuse), self.assertRaises(OSError):
            smtps.connect('x.org', 25, 30)

        self.assertEqual([v4, v6, other_v4],
                         [call[0][3] for call in refuse.call_args_list])
        self.assertEqual({smtps.ADDRESS_TIME},
                         {call[0][4] for call in refuse.call_args_list})

    def test_no_starttls_is_an_error(self):
        delivery = self.delivery()

        with self.assertRaises(OSError):
            delivery.start_tls(client_tls())

    def test_a_greeting_that_is_none_is_an_error(self):
        for greeting in '554 5.3.0 no', b'SSH-2.0-x\r\n', DROP:
            self.serve({'': greeting})
            with self.subTest(greeting), self.assertRaises(OSError):
                self.connect()

    def test_a_login_is_never_shown(self):
        self.serve({'AUTH': lambda talk: '535 what is %s?' % talk.line})
        delivery = self.connect(redact=lambda text: text.replace('geheim', ''),
                                debuglevel=1)

        with self.assertLogs(smtps.log, logging.INFO) as logs:
            code, text = delivery.ask('AUTH PLAIN geheim')

        self.assertEqual((535, b'what is AUTH PLAIN geheim?'), (code, text))
        self.assertNotIn('geheim', ' '.join(logs.output))
        self.assertIn('send: ***', ' '.join(logs.output))


class Content(DeliveryCase):

    def test_a_file_is_sent_from_offset_to_offset(self):
        lines = b''.join(b'..%06d and so on\r\n' % n for n in range(9000))
        for options, tls in (({}, None), ({'extensions': ()}, None), (
                {'tls': server_tls(), 'implicit': True}, client_tls())):
            self.serve(**options)
            with self.subTest(options), tempfile.TemporaryFile() as file:
                file.write(b'12345' + b'\r\n' + lines + b'67890')
                part = smtps.FilePart(file, 5, 7 + len(lines))

                self.assertSent(self.connect(tls).send(
                    envelope(), HEADER, part))

                self.assertTrue(self.server.mails[0].raw
                                == HEADER + b'\r\n' + lines)

    def test_a_file_that_became_shorter_is_never_a_whole_mail(self):
        delivery = self.delivery()
        with tempfile.TemporaryFile() as file:
            file.write(b'\r\nshort\r\n')

            report = delivery.send(envelope(), HEADER,
                                   smtps.FilePart(file, 0, 100))

        self.assertEqual(([A], []), (report.open, self.server.mails))
        self.assertIn('shorter', str(report.error))

    def test_8bitmime_is_announced_where_it_is_offered(self):
        for extensions, expected in ((EXTENSIONS, {'BODY': '8BITMIME'}),
                                     ((), {})):
            with self.subTest(extensions=extensions):
                delivery = self.delivery(extensions=extensions)

                self.assertSent(delivery.send(
                    envelope(BODY='8bitmime'), HEADER, BODY))

                self.assertEqual(expected, self.server.mails[0].parameters)

    def test_nothing_that_a_client_made_up_is_handed_on(self):
        """A strict server refuses it for good."""
        for parameters, expected in (
                ({'BODY': '7bit'}, {'BODY': '7BIT'}),
                ({'BODY': 'BINARYMIME'}, {}), ({'BODY': 'FOO'}, {}),
                ({'BODY': ''}, {}), ({'SMTPUTF8': 'x'}, {}),
                ({'SMTPUTF8': '\udcff'}, {}), ({'RET': 'FULL'}, {}),
                ({'AUTH': '<>', 'SIZE': '7'}, {})):
            with self.subTest(parameters):
                delivery = self.delivery()

                self.assertSent(delivery.send(
                    envelope(**parameters), HEADER, BODY))

                self.assertEqual(expected, self.server.mails[0].parameters)

    def test_smtputf8_is_used_only_where_needed(self):
        for asked, expected in ((envelope(NAME), {'SMTPUTF8': ''}),
                                (envelope(SMTPUTF8=''), {'SMTPUTF8': ''}),
                                (envelope(), {})):
            with self.subTest(asked):
                delivery = self.delivery()

                self.assertSent(delivery.send(asked, HEADER, BODY),
                                *asked.recipients)

                self.assertEqual(expected, self.server.mails[0].parameters)

    def test_smtputf8_needed_and_not_offered_is_permanent(self):
        delivery = self.delivery(extensions=('PIPELINING',))

        report = delivery.send(envelope(NAME), HEADER, BODY)

        self.assertIn('550 5.6.7 needs SMTPUTF8', report.never[NAME])
        self.assertSent(delivery.send(envelope(), HEADER, BODY))

    def test_smtputf8_that_no_address_needs_keeps_no_mail_back(self):
        """Go's library asks for it wherever it is offered."""
        delivery = self.delivery(extensions=('PIPELINING',))

        report = delivery.send(envelope(SMTPUTF8=''),
                               'Subject: Grüße\r\n'.encode(), BODY)

        self.assertSent(report)
        self.assertEqual({}, self.server.mails[0].parameters)

    def test_the_size_goes_along_where_it_is_offered(self):
        for extensions, expected in ((EXTENSIONS, {'SIZE': '24'}), ((), {})):
            with self.subTest(extensions=extensions):
                delivery = self.delivery(extensions=extensions)

                self.assertSent(delivery.send(
                    envelope()._replace(size=24), HEADER, BODY))

                self.assertEqual(expected, self.server.mails[0].parameters)

    def test_what_is_larger_than_the_server_takes_is_not_sent_there(self):
        for offer, size, refused in (
                ('SIZE 100', 101, True), ('SIZE 100', 100, False),
                ('SIZE 0', 10 ** 9, False), ('SIZE', 10 ** 9, False),
                ('SIZE many', 10 ** 9, False)):
            with self.subTest(offer, size=size):
                delivery = self.delivery(extensions=[offer])

                report = delivery.send(
                    envelope()._replace(size=size), HEADER, BODY)

                self.assertEqual(refused, '552 5.3.4' in str(report.never))
                self.assertEqual(refused, 'MAIL' not in self.verbs())

    def test_what_is_too_large_does_not_go_ahead_either(self):
        delivery = self.delivery(extensions=['PIPELINING', 'SIZE 100'])
        large = envelope(B)._replace(size=101)

        self.assertSent(delivery.send(
            envelope(), HEADER, BODY, lambda: large))

        self.assertEqual([B], list(delivery.send(
            large, HEADER, BODY).never))
        self.assertEqual(['EHLO', 'MAIL', 'RCPT', 'DATA'], self.verbs())

    def test_no_address_brings_a_command_of_its_own(self):
        for address in 'a@x>\r\nRSET', 'a@x\nb', 'a@x\rb':
            delivery = self.delivery()
            with self.subTest(address), self.assertRaises(ValueError):
                delivery.send(envelope(address), HEADER, BODY)

            self.assertEqual(['EHLO'], self.verbs())


class Folded(unittest.TestCase):
    """Lines of more than 998 bytes, for servers that take none."""

    def folded(self, content, **options):
        """The same from memory and from a file."""
        with tempfile.TemporaryFile() as file:
            file.write(b'12345' + content + b'67890')
            part = smtps.FilePart(file, 5, 5 + len(content))
            pieces = list(smtps.folded(part, **options))
        self.assertEqual(b''.join(pieces), b''.join(
            smtps.folded(content, **options)))
        self.assertLess(max(map(len, pieces)), 70000)
        return b''.join(pieces)

    def test_no_line_is_too_long_and_nothing_is_lost(self):
        for length in (0, 1, 997, 998, 999, 1000, 1001, 1995, 1996, 8000,
                       200000):
            for before in b'', b'.. a\r\n\r\n':
                with self.subTest(length, before=before):
                    content = before + b'x' * length + b'\r\nend\r\n'

                    result = self.folded(content)

                    self.assertLessEqual(
                        max(map(len, result.split(b'\r\n'))), 998)
                    self.assertEqual(content, result.replace(b'\r\n x', b'x'))

    def test_what_is_short_enough_stays_as_it_is(self):
        content = (b'y' * 998 + b'\r\n') * 300

        self.assertEqual(content, self.folded(content))
        self.assertEqual(content, self.folded(content, at_blanks=True))

    def test_no_letter_is_cut_in_two(self):
        for start in range(4):
            text = 'x' * start + '\U0001f600\u20acä' * 400

            result = self.folded(text.encode() + b'\r\n').decode()

            self.assertEqual(text, result.replace('\r\n ', '').rstrip())

    def test_a_header_is_broken_at_its_own_blanks(self):
        for field in (b'To: ' + b'a@example.org, ' * 300 + b'b@x\r\n',
                      b'To:' + b'\ta@example.org,' * 300 + b'\r\n'):
            result = self.folded(field, at_blanks=True)

            self.assertEqual(field, result.replace(b'\r\n ', b' ').replace(
                b'\r\n\t', b'\t'))
            self.assertLessEqual(max(map(len, result.split(b'\r\n'))), 998)

    def test_a_header_without_a_blank_is_broken_all_the_same(self):
        result = self.folded(b'X: ' + b'y' * 3000 + b'\r\n', at_blanks=True)

        self.assertEqual([2, 998, 998, 998, 10], [
            len(line) for line in result.split(b'\r\n')[:-1]])

    def test_a_file_that_became_shorter_is_an_error(self):
        with tempfile.TemporaryFile() as file, self.assertRaises(OSError):
            list(smtps.folded(smtps.FilePart(file, 0, 100)))


class Packets(DeliveryCase):
    """Several mails, one connection, few packets."""

    def test_several_mails_go_over_one_connection(self):
        for extensions in EXTENSIONS, STEPWISE:
            with self.subTest(extensions=extensions):
                delivery = self.delivery(extensions=extensions)

                for _ in range(4):
                    self.assertSent(delivery.send(envelope(), HEADER, BODY))

                self.assertEqual((4, 1), (len(self.server.mails),
                                          self.server.connections))
                self.assertNotIn('RSET', self.verbs())

    def test_the_envelope_is_one_packet_if_pipelining_is_offered(self):
        packet = b'RCPT TO:<a@x.org>\r\nRCPT TO:<b@x.org>\r\nDATA\r\n'
        for extensions, expected in (EXTENSIONS, packet), (STEPWISE, b''):
            with self.subTest(extensions=extensions):
                seen = []
                delivery = self.delivery({'MAIL': lambda talk: seen.append(
                    waiting(talk))}, extensions)

                report = delivery.send(envelope(A, B), HEADER, BODY)

                self.assertSent(report, A, B)
                self.assertEqual([expected], seen)

    def test_the_next_envelope_follows_the_final_dot(self):
        def peek(conversation):
            conversation.socket.settimeout(5)
            seen.append(conversation.file.peek())
            conversation.socket.settimeout(None)
        seen, delivery = [], self.delivery()
        self.server.script['.'] = [peek, None]

        self.assertSent(delivery.send(envelope(), HEADER, BODY,
                                      lambda: envelope(B)))
        self.assertSent(delivery.send(envelope(B), HEADER, BODY), B)

        self.assertTrue(seen[0].startswith(b'MAIL FROM:'), seen)
        self.assertEqual(['MAIL', 'RCPT', 'DATA'] * 2, self.verbs()[1:])

    def test_nothing_follows_the_dot_without_pipelining(self):
        seen = []
        delivery = self.delivery(
            {'.': lambda talk: seen.append(waiting(talk))}, STEPWISE)

        for _ in range(2):
            self.assertSent(delivery.send(envelope(), HEADER, BODY,
                                          self.fail))

        self.assertEqual([b'', b''], seen)

    def test_nobody_is_asked_for_the_next_before_the_server_wants_this(self):
        for script in {'MAIL': '550 x'}, {'RCPT': '450 x'}, {'DATA': '451 x'}:
            with self.subTest(script=script):
                self.delivery(script).send(envelope(), HEADER, BODY,
                                           self.fail)

    def test_the_next_envelope_may_be_refused(self):
        delivery = self.delivery({'RCPT TO:<b@': '550 5.1.1 nobody'})

        self.assertSent(delivery.send(envelope(), HEADER, BODY,
                                      lambda: envelope(B)))
        report = delivery.send(envelope(B), HEADER, BODY,
                               lambda: envelope(C))
        self.assertEqual([B], list(report.never))
        self.assertSent(delivery.send(envelope(C), HEADER, BODY), C)

        self.assertEqual([[A], [C]], [m.to for m in self.server.mails])

    def test_another_mail_never_goes_under_an_envelope_on_its_way(self):
        delivery = self.delivery()
        delivery.send(envelope(), HEADER, BODY, lambda: envelope(B))

        with self.assertRaises(ValueError):
            delivery.send(envelope(C), HEADER, BODY)

        self.assertFalse(delivery.connected)
        self.assertEqual([[A]], [mail.to for mail in self.server.mails])

    def test_close_says_quit(self):
        delivery = self.delivery()

        delivery.close(politely=True)

        wait_until(lambda: not self.server.open)
        self.assertEqual('QUIT', self.verbs()[-1])


class Verdicts(DeliveryCase):
    """Per recipient, read from the replies."""

    @staticmethod
    def letters(report):
        """{first letter of a recipient: the name of its verdict}."""
        return {recipient[0]: name for name in ('sent', 'later', 'never')
                for recipient in getattr(report, name)}

    def test_who_is_accepted_refused_or_told_to_wait(self):
        second = 'RCPT TO:<b@'
        for script, a, b in (
                ({second: '451 4.2.0 busy'}, 'sent', 'later'),
                ({second: '550 5.1.1 nobody'}, 'sent', 'never'),
                ({'RCPT TO:<a@': '450 x', second: '553 y'}, 'later', 'never'),
                ({'RCPT': '450 4.2.0 full'}, 'later', 'later'),
                ({'MAIL': '451 4.3.0 x'}, 'later', 'later'),
                ({'MAIL': '550 5.7.1 x'}, 'never', 'never'),
                ({second: '552 5.5.3 too many'}, 'sent', 'later'),
                ({'RCPT': '552 5.2.2 full'}, 'never', 'never'),
                ({second: '552 x', 'RCPT TO:<a@': '550 y'}, 'never', 'never'),
                ({'DATA': '451 4.3.0 x'}, 'later', 'later'),
                ({'DATA': '554 5.3.0 x'}, 'never', 'never'),
                ({second: '450 x', 'DATA': '554 y'}, 'never', 'later'),
                ({'.': '452 4.3.1 full'}, 'later', 'later'),
                ({'.': '554 5.7.1 spam'}, 'never', 'never'),
                ({second: '450 x', '.': '554 spam'}, 'never', 'later')):
            for extensions in EXTENSIONS, STEPWISE:
                with self.subTest(script=script, extensions=extensions):
                    report = self.delivery(script, extensions).send(
                        envelope(A, B), HEADER, BODY)

                    self.assertEqual({'a': a, 'b': b}, self.letters(report))
                    self.assertEqual('sent' in (a, b),
                                     bool(self.server.mails))

    def test_the_report_says_that_there_were_too_many(self):
        for replies, crowded in (([None, '452 4.5.3 x'], True),
                                 ([None, '552 too many'], True),
                                 ([None, '451 4.2.0 busy'], False),
                                 (['452 4.5.3 x'], False)):
            with self.subTest(replies):
                report = self.delivery({'RCPT': replies}).send(
                    envelope(A, B), HEADER, BODY)

                self.assertEqual(crowded, report.crowded)

    def test_what_makes_no_sense_is_no_verdict_for_good(self):
        for stage, code in (('MAIL', 354), ('RCPT', 354), ('DATA', 250),
                            ('.', 354), ('MAIL', 199), ('RCPT', 600)):
            for extensions in EXTENSIONS, STEPWISE:
                with self.subTest(stage, code=code, extensions=extensions):
                    delivery = self.delivery({stage: '%d what?' % code},
                                             extensions)
                    try:
                        report = delivery.send(envelope(), HEADER, BODY)
                    except OSError:
                        continue
                    self.assertEqual({}, dict(report.sent, **report.never))

    def test_after_a_refusal_the_next_mail_goes_over_the_same_line(self):
        for script in ({'MAIL': ['550 x', None]}, {'RCPT': ['450 x', None]},
                       {'DATA': ['451 x', None]}, {'.': ['554 x', None]}):
            for extensions in EXTENSIONS, STEPWISE:
                with self.subTest(script=script, extensions=extensions):
                    delivery = self.delivery(script, extensions)
                    delivery.send(envelope(), HEADER, BODY)

                    self.assertSent(delivery.send(
                        envelope(B), HEADER, BODY), B)

                    self.assertEqual(1, self.server.connections)
                    self.assertEqual('.' not in script,
                                     'RSET' in self.verbs())

    def test_a_354_with_nobody_left_ends_in_an_empty_mail(self):
        """RFC 2920 3.1: a server may say 354 though it refused everybody."""
        def do_DATA(conversation, argument):
            if conversation.mail.to:
                return usual(conversation, argument)
            conversation.mail = None
            conversation.say('354 go on')
            lines.append(conversation.read_line())
            conversation.say('554 5.5.1 no valid recipients')
        usual, lines = FakeSMTP.TALK.do_DATA, []
        delivery = self.delivery({'RCPT TO:<a@': '550 5.1.1 nobody'})
        with mock.patch.object(FakeSMTP.TALK, 'do_DATA', do_DATA):

            report = delivery.send(envelope(), HEADER, BODY)

            self.assertEqual([A], list(report.never))
            self.assertEqual([b'.\r\n'], lines)
            self.assertSent(delivery.send(envelope(B), HEADER, BODY), B)

    def test_the_reply_is_kept_in_one_line_without_secrets(self):
        self.serve({'RCPT': '550-5.1.1 no geheim\n550 5.1.1 \x07user'})
        delivery = self.connect(
            redact=lambda text: text.replace('geheim', '***'))

        report = delivery.send(envelope(), HEADER, BODY)

        self.assertEqual('550 5.1.1 no *** 5.1.1 user', report.never[A])

    def test_a_refusal_in_the_middle_of_the_mail_is_heard(self):
        delivery = self.delivery({'DATA': refuse_in_the_middle})

        report = delivery.send(envelope(), HEADER,
                               b'\r\n' + b'0123456789abcd\r\n' * 200000)

        self.assertIn('552 5.3.4 too large', report.never.get(A, ''))

    def test_it_is_heard_though_the_connection_is_reset(self):
        delivery = self.delivery({'DATA': refuse_and_reset})

        report = delivery.send(envelope(), HEADER,
                               b'\r\n' + b'0123456789abcd\r\n' * 2000000)

        self.assertIn('552 5.3.4 too large', report.never.get(A, ''))
        self.assertFalse(delivery.connected)

    def test_a_421_to_the_final_dot_is_a_verdict_and_the_end(self):
        delivery = self.delivery({'.': '421 4.3.2 later'})

        report = delivery.send(envelope(), HEADER, BODY)

        self.assertEqual({A: '421 4.3.2 later'}, report.later)
        self.assertFalse(delivery.connected)


class Failures(DeliveryCase):
    """What the docstring of Delivery promises."""

    def test_before_the_content_it_raises_and_another_may_try(self):
        for stage in 'MAIL', 'RCPT', 'DATA':
            for action in DROP, '421 4.3.2 closing':
                for extensions in EXTENSIONS, STEPWISE:
                    delivery = self.delivery({stage: action}, extensions)
                    with self.subTest(stage, action=action,
                                      extensions=extensions):
                        with self.assertRaises(OSError):
                            delivery.send(envelope(), HEADER, BODY)

                        self.assertFalse(delivery.connected)
                        self.assertEqual([], self.server.mails)

    def test_a_421_before_any_recipient_is_the_servers_own_trouble(self):
        for stage, expected in (('MAIL', True), ('RCPT', False),
                                ('DATA', False)):
            delivery = self.delivery({stage: '421 4.3.2 closing'})
            with self.subTest(stage), self.assertRaises(OSError) as raised:
                delivery.send(envelope(), HEADER, BODY)

            self.assertEqual(expected, isinstance(
                raised.exception, smtps.ServiceUnavailable))

    def test_a_421_says_what_it_was_said_to(self):
        for stage in 'MAIL', 'RCPT', 'DATA':
            for extensions in EXTENSIONS, STEPWISE:
                delivery = self.delivery({stage: '421 4.3.2 closing'},
                                         extensions)
                with self.subTest(stage, extensions=extensions):
                    with self.assertRaises(smtps.ServiceClosing) as raised:
                        delivery.send(envelope(), HEADER, BODY)

                    self.assertEqual(
                        (stage.lower(), '4.3.2 closing'),
                        (raised.exception.stage, raised.exception.text))

    def test_behind_the_content_the_report_says_who_is_in_doubt(self):
        delivery = self.delivery({'RCPT TO:<b@': '550 5.1.1 nobody',
                                  '.': DROP})

        report = delivery.send(envelope(A, B), HEADER, BODY)

        self.assertEqual(([A], [B]), (report.open, list(report.never)))
        self.assertIsInstance(report.error, OSError)
        self.assertFalse(delivery.connected)

    def test_a_closed_one_says_so(self):
        delivery = self.delivery()
        delivery.close()

        with self.assertRaisesRegex(OSError, 'closed'):
            delivery.send(envelope(), HEADER, BODY)
        delivery.close()

    def test_a_fault_of_the_caller_leaves_no_half_a_mail(self):
        delivery = self.delivery()

        with self.assertRaises(ZeroDivisionError):
            delivery.send(envelope(), HEADER, BODY, lambda: 1 // 0)

        self.assertFalse(delivery.connected)
        self.assertEqual([], self.server.mails)

    def test_it_knows_whether_it_was_used(self):
        delivery = self.delivery({'RCPT': ['550 5.1.1 nobody', None]})
        before = delivery.used

        delivery.send(envelope(), HEADER, BODY)

        self.assertEqual((False, True), (before, delivery.used))


class Trickle:
    """A socket that gives a byte at a time and lets time pass."""

    def __init__(self, data, clock):
        self.data, self.clock, self.timeout = data, clock, 30

    def gettimeout(self):
        return self.timeout

    def settimeout(self, seconds):
        self.timeout = seconds

    def recv(self, size):
        self.clock[0] += 7
        byte, self.data = self.data[:1], self.data[1:]
        return byte


class Bounds(unittest.TestCase):
    """A server can't keep us for ever, nor fill the memory."""

    def reader(self, data):
        clock = [0.0]
        patch = mock.patch('time.monotonic', lambda: clock[0])
        patch.start()
        self.addCleanup(patch.stop)
        self.sock = Trickle(data, clock)
        return smtps.BoundedReader(self.sock)

    def test_a_whole_reply_has_its_time_not_each_byte(self):
        reader = self.reader(b'250 fi\r\n')

        self.assertEqual(b'250 fi\r\n', reader.readline())

        with self.assertRaisesRegex(OSError, 'timed out'):
            self.reader(b'250 a longer line\r\n').readline()
        self.assertLess(self.sock.timeout, 10)

    def test_each_reply_has_its_own_time(self):
        reader = self.reader(b'250 f\r\n' * 2)
        for _ in range(2):
            reader.expect(60)

            self.assertEqual(b'250 f\r\n', reader.readline())

    def test_the_end_and_the_limit_end_a_line(self):
        self.assertEqual(b'250', self.reader(b'250').readline())
        self.assertEqual(b'25', self.reader(b'250 \r\n').readline(2))


if __name__ == '__main__':
    unittest.main()
