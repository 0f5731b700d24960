"""The example handlers, through the plain API that MailHandler.py explains."""

import base64
import email
import errno
import os
import tempfile
import unittest
from types import SimpleNamespace
from unittest import mock

import MailHandler
from handlers.discardsubject import DiscardSubject
from handlers.rewriteaddress import RewriteAddress
from handlers.savevoice import SaveVoice

WAV = b'RIFF\x00\x00\x00\x00WAVEfmt \x80\xff'


class Log:
    def __init__(self):
        self.infos, self.errors = [], []
        self.info, self.error = self.infos.append, self.errors.append


class Callback:
    def setTo(self, string):
        self.to = string

    def setFrom(self, string):
        self.frm = string


def mail_bytes(subject='Voice message', names=('call.wav',), data=WAV,
               kind='audio/x-wav', extra=''):
    """A mail as an answering machine sends it, one part for each name."""
    lines = ['From: pbx@home.lan', extra or 'To: me@home.lan',
             'Subject: ' + subject, 'MIME-Version: 1.0',
             'Content-Type: multipart/mixed; boundary=b', '',
             '--b', 'Content-Type: text/plain', '', 'A call.']
    for name in names:
        lines += ['--b', 'Content-Type: ' + kind,
                  'Content-Transfer-Encoding: base64',
                  'Content-Disposition: attachment' + (
                      name if name.startswith(';') else
                      '; filename="%s"' % name.replace('\\', '\\\\')),
                  '', base64.b64encode(data).decode()]
    return '\r\n'.join(lines + ['--b--', '']).encode('utf-8')


class ExampleCase(unittest.TestCase):
    """One handler, a log, and a mail that is run through it."""

    def setUp(self):
        self.log, self.callback = Log(), Callback()

    def start(self, handler_class, config=None):
        self.handler = handler_class()
        self.handler.setLogger(self.log)
        self.log.errors += self.handler.setConfig(config or {}) or []
        return self.handler

    def run_mail(self, msg, frm='pbx@home.lan', to=('me@home.lan',)):
        self.mail = SimpleNamespace(frm=frm, to=list(to), msg=msg)
        result = self.handler.handleMessage(
            email.message_from_bytes(msg), self.mail, self.callback)
        self.assertIs(type(result), bool)
        self.assertEqual(self.mail.msg, msg)
        return result

    def assertStaysOff(self, handler_class, config, hint):
        self.assertFalse(self.start(handler_class, config).isEnabled())
        self.assertEqual(len(self.log.errors), 1)
        self.assertIn(hint, self.log.errors[0])


class EveryExample(ExampleCase):
    examples = (SaveVoice, RewriteAddress, DiscardSubject)

    def test_is_off_without_a_section(self):
        for example in self.examples:
            handler = example()
            handler.setLogger(self.log)
            self.assertFalse(handler.isEnabled())
            handler.setConfig({})
            self.assertFalse(handler.isEnabled())
        self.assertEqual(self.log.errors, [])

    def test_a_misspelt_switch_is_named(self):
        for example in self.examples:
            with self.subTest(example.__name__):
                self.log = Log()
                self.assertStaysOff(example, {'enabled': 'ture'}, 'ture')

    def test_an_unknown_key_is_named(self):
        for example in self.examples:
            with self.subTest(example.__name__):
                self.log = Log()
                self.assertStaysOff(example, {'foldr': '/x'}, 'foldr')

    def test_the_example_in_the_manual_works(self):
        lines = MailHandler.__doc__.splitlines()
        first = lines.index('    from MailHandler import MailHandler')
        last = lines.index('            return True', first + 6)
        code = '\n'.join(line[4:] for line in lines[first:last + 1])
        names = {}
        exec(code, names)
        self.start(names['Camera'])
        self.assertTrue(self.run_mail(b'\n', frm='camera@home.lan'))
        self.assertEqual(self.callback.to, 'me@example.org')

    def test_a_handler_that_lacks_a_method_cannot_be_made(self):
        class Half(MailHandler.MailHandler):
            def isEnabled(self):
                return True
        with self.assertRaisesRegex(TypeError, 'handleMessage'):
            Half()


class SavingVoice(ExampleCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = os.path.join(folder.name, 'voice')
        os.mkdir(self.folder)

    def begin(self, **config):
        config = {'enabled': 'true', 'folder': self.folder, **config}
        return self.start(SaveVoice, {
            key.rstrip('_'): value for key, value in config.items()})

    def saved(self):
        """The names in the folder, without their check sums."""
        names = os.listdir(self.folder)
        sums = [name.rsplit('-', 1)[1][:12] for name in names]
        return sorted(name.replace('-' + check, '')
                      for name, check in zip(names, sums))

    def only_file(self):
        name, = os.listdir(self.folder)
        return os.path.join(self.folder, name)

    def test_saves_the_audio_and_the_mail_goes_on(self):
        self.assertTrue(self.begin().isEnabled())
        self.assertTrue(self.run_mail(mail_bytes()))
        self.assertEqual(self.saved(), ['call.wav'])
        name = self.only_file()
        with open(name, 'rb') as file:
            self.assertEqual(file.read(), WAV)
        self.assertIn(name, self.log.infos[0])

    def test_discards_a_saved_mail_on_request(self):
        self.begin(discard='yes')
        self.assertFalse(self.run_mail(mail_bytes()))

    def test_mail_without_audio_is_never_discarded(self):
        self.begin(discard='yes')
        self.assertTrue(self.run_mail(mail_bytes(names=())))
        self.assertTrue(self.run_mail(mail_bytes(kind='image/png')))
        self.assertEqual(self.saved(), [])

    def test_takes_only_mail_of_the_given_sender(self):
        self.begin(from_='PBX@home.lan')
        self.run_mail(mail_bytes(), frm='camera@home.lan')
        self.assertEqual(self.saved(), [])
        self.run_mail(mail_bytes(), frm='pbx@Home.lan')
        self.assertEqual(self.saved(), ['call.wav'])

    def test_takes_only_mail_with_the_text_in_its_subject(self):
        self.begin(subject='nachricht für')
        self.run_mail(mail_bytes(subject='Fax'))
        self.assertEqual(self.saved(), [])
        self.run_mail(mail_bytes(subject='=?utf-8?q?Nachricht_f=C3=BCr?= 7'))
        self.assertEqual(self.saved(), ['call.wav'])

    def test_takes_the_given_types_too(self):
        self.begin(types='audio/*, application/Octet-Stream')
        self.run_mail(mail_bytes(kind='application/octet-stream'))
        self.assertEqual(self.saved(), ['call.wav'])

    def test_two_attachments_of_one_name_are_two_files(self):
        self.begin()
        self.run_mail(mail_bytes())
        self.run_mail(mail_bytes(data=WAV + b'other'))
        self.assertEqual(self.saved(), ['call.wav', 'call.wav'])

    def test_a_second_run_of_one_mail_makes_no_second_file(self):
        self.begin(discard='true')
        for _ in range(2):
            self.assertFalse(self.run_mail(mail_bytes(names=('a', 'b'))))
        self.assertEqual(self.saved(), ['a', 'b'])

    def test_what_a_crash_left_behind_is_replaced(self):
        self.begin()
        self.run_mail(mail_bytes())
        name = self.only_file()
        os.rename(name, name + '.part')
        self.run_mail(mail_bytes())
        self.assertEqual(self.saved(), ['call.wav'])

    def test_evil_names_stay_in_the_folder(self):
        self.begin()
        for name, safe in (
                ('../../etc/passwd', 'passwd'), ('C:\\x', 'x'),
                ('/abs/', 'voice'), ('', 'voice'), ('..', 'voice'),
                ('.profile', 'profile'), ('a\tb\x00c:d*', 'a b_c_d_'),
                ('-rf x.wav ', 'rf x.wav')):
            with self.subTest(name):
                self.run_mail(mail_bytes(names=(name,)))
                self.assertEqual(self.saved(), [safe])
                os.remove(self.only_file())
        self.assertEqual(os.listdir(os.path.dirname(self.folder)), ['voice'])

    def test_a_long_name_is_cut_and_keeps_its_end(self):
        self.begin()
        self.run_mail(mail_bytes(names=('ü' * 300 + '.wav',)))
        self.run_mail(mail_bytes(names=('x' * 300 + '.' + 'y' * 300,)))
        for name in os.listdir(self.folder):
            self.assertLess(len(name.encode()), 138)
        self.assertIn('x' * 80 + '.yyyyyyy', self.saved())

    def test_encoded_names_are_decoded(self):
        self.begin()
        names = ('=?utf-8?q?M=C3=BCller=2Ewav?=',
                 ";filename*=iso-8859-1''R%FCckruf%2Fx%2Ewav",
                 "; filename*0*=utf-8''%C3%A4; filename*1=b.wav",
                 '=?utf-8?b?abcde?=', '=?nonsense?q?x?=')
        self.run_mail(mail_bytes(names=names))
        self.assertEqual(self.saved(), sorted([
            'Müller.wav', 'x.wav', 'äb.wav', '__utf-8_b_abcde__',
            '__nonsense_q_x__']))

    def test_a_name_beyond_decoding_costs_no_mail(self):
        self.begin(discard='true')
        name = "; filename*=undefined''x"
        self.assertTrue(self.run_mail(mail_bytes(names=(name,))))
        self.assertIn('mail goes on', self.log.errors[0])

    def test_audio_without_a_name_gets_one(self):
        self.begin()
        self.run_mail(mail_bytes(names=(';',)))
        self.assertEqual(self.saved(), ['voice.wav'])

    def test_without_a_full_path_it_stays_off(self):
        for folder in ('', 'voice'):
            self.log = Log()
            self.assertStaysOff(
                SaveVoice, {'enabled': 'on', 'folder': folder}, 'full path')

    def test_a_missing_folder_costs_no_mail_and_may_come_back(self):
        os.rmdir(self.folder)
        self.assertTrue(self.begin(discard='true').isEnabled())
        self.assertIn(self.folder, self.log.errors[0])
        self.assertTrue(self.run_mail(mail_bytes()))
        self.assertIn(self.folder, self.log.errors[1])
        os.mkdir(self.folder)
        self.assertFalse(self.run_mail(mail_bytes()))
        self.assertEqual(len(self.log.errors), 2)

    def test_a_full_disk_costs_no_mail_and_leaves_no_half_file(self):
        self.begin(discard='true')
        full = OSError(errno.ENOSPC, 'No space left on device')
        with mock.patch('os.fsync', side_effect=full):
            self.assertTrue(self.run_mail(mail_bytes()))
        self.assertEqual(os.listdir(self.folder), [])
        self.assertIn('No space left', self.log.errors[0])

    def test_a_file_in_place_of_the_folder_costs_no_mail(self):
        os.rmdir(self.folder)
        with open(self.folder, 'w'):
            pass
        self.begin(discard='true')
        self.assertTrue(self.run_mail(mail_bytes()))
        self.assertEqual(len(self.log.errors), 2)


class RewritingAddresses(ExampleCase):
    def begin(self, rules):
        self.start(RewriteAddress, {'enabled': 'true', **rules})
        self.assertEqual(self.log.errors, [])
        self.assertTrue(self.handler.isEnabled())

    def test_a_sender_gets_its_new_address(self):
        self.begin({'from pbx@home.lan': 'office@example.org'})
        self.assertTrue(self.run_mail(mail_bytes(), frm='PBX@home.lan'))
        self.assertEqual(vars(self.callback), {'frm': 'office@example.org'})
        self.assertEqual(self.mail.to, ['me@home.lan'])

    def test_other_mail_is_left_alone(self):
        self.begin({'from x@home.lan': 'a@b', 'to pbx@home.lan': 'a@b'})
        self.assertTrue(self.run_mail(mail_bytes()))
        self.assertEqual(vars(self.callback), {})
        self.assertEqual(self.mail.to, ['me@home.lan'])

    def test_the_one_recipient_changes_in_header_and_envelope(self):
        self.begin({'to ME@home.lan': 'me@example.org'})
        self.assertTrue(self.run_mail(mail_bytes()))
        self.assertEqual(vars(self.callback), {'to': 'me@example.org'})

    def test_a_name_without_a_domain_can_be_rewritten(self):
        self.begin({'to root': 'me@example.org'})
        self.run_mail(mail_bytes(extra='To: System <root>'), to=['root'])
        self.assertEqual(self.callback.to, 'me@example.org')

    # rules, what is rewritten, what comes of it
    PATTERNS = (
        (('*',), 'root', 'x@b'), (('*',), 'me@home.lan', 'x@b'),
        (('*@home.lan',), 'ME@Home.lan', 'x@b'),
        (('*@home.lan',), 'me@sub.home.lan', 'me@sub.home.lan'),
        (('*@home.lan',), 'home.lan', 'home.lan'),
        (('*', '*@home.lan', 'me@home.lan'), 'me@home.lan', 'z@b'),
        (('*', '*@home.lan', 'me@home.lan'), 'you@home.lan', 'y@b'),
        (('*', '*@home.lan', 'me@home.lan'), 'you@else.where', 'x@b'))

    def test_a_star_stands_for_all_and_the_most_precise_rule_counts(self):
        for kind in 'to', 'from':
            for rules, old, new in self.PATTERNS:
                with self.subTest('%s %s: %s' % (kind, rules, old)):
                    self.callback = Callback()
                    self.begin(dict(zip(['%s %s' % (kind, rule) for rule in
                                         rules], ('x@b', 'y@b', 'z@b'))))
                    self.run_mail(mail_bytes(extra='To: ' + old), old, [old])
                    self.assertEqual([new], list(
                        vars(self.callback).values()) or [old])

    def test_one_address_may_become_several(self):
        self.begin({'to me@home.lan': 'a@example.org, b@example.org'})
        self.run_mail(mail_bytes())
        self.assertEqual(self.callback.to, 'a@example.org, b@example.org')

    def test_only_the_named_one_of_several_changes(self):
        self.begin({'to me@home.lan': 'me@example.org'})
        both = ['me@home.lan', 'you@home.lan']
        self.run_mail(mail_bytes(extra='To: ' + ', '.join(both)), to=both)
        self.assertEqual(self.callback.to, 'me@example.org, you@home.lan')

    def test_two_that_become_one_get_the_mail_once(self):
        self.begin({'to me@home.lan': 'you@home.lan'})
        self.run_mail(mail_bytes(), to=['me@home.lan', 'you@home.lan'])
        self.assertEqual(self.mail.to, ['you@home.lan'])

    def test_a_blind_copy_stays_blind(self):
        self.begin({'to me@home.lan': 'me@example.org'})
        self.run_mail(mail_bytes(), to=['me@home.lan', 'boss@home.lan'])
        self.assertEqual(vars(self.callback), {})
        self.assertEqual(self.mail.to, ['me@example.org', 'boss@home.lan'])

    def test_the_null_sender_is_no_address(self):
        self.begin({'from pbx@home.lan': 'a@b', 'from *': 'a@b'})
        self.assertTrue(self.run_mail(mail_bytes(), frm=''))
        self.assertEqual(vars(self.callback), {})

    def test_a_rule_that_is_none_is_named(self):
        for key, value in (('from a@b', 'office'), ('from a@b', 'c@d, e@f'),
                           ('to', 'c@d'), ('to a@b', ''), ('cc a@b', 'c@d'),
                           ('to a@b c@d', 'e@f'), ('to a@b', 'Me <c@d>'),
                           ('to @b', 'c@d'), ('to a@*', 'c@d'),
                           ('to *@*.b', 'c@d'), ('to a*@b', 'c@d'),
                           ('to *@', 'c@d'), ('from <a@b>', 'c@d')):
            with self.subTest('%s=%s' % (key, value)):
                self.log = Log()
                self.assertStaysOff(RewriteAddress, {
                    'enabled': 'true', key: value}, key + '=' + value)


class DiscardingBySubject(ExampleCase):
    def begin(self, contains):
        self.start(DiscardSubject, {'enabled': '1', 'contains': contains})
        self.assertEqual(self.log.errors, [])

    def test_discards_what_contains_one_of_the_texts(self):
        self.begin('toner low | Backup  finished')
        for subject in ('Printer: TONER LOW!', 'backup\r\n finished'):
            self.assertFalse(self.run_mail(mail_bytes(subject)))
        self.assertIn("'toner low'", self.log.infos[0])

    def test_lets_other_mail_go_on(self):
        self.begin('toner low|backup finished')
        for subject in ('', 'toner', 'Backup failed', '|'):
            self.assertTrue(self.run_mail(mail_bytes(subject)))
        self.assertTrue(self.run_mail(b'\r\nno header, toner low\r\n'))
        self.assertEqual(self.log.infos, [])

    def test_reads_encoded_and_raw_subjects(self):
        self.begin('grüße')
        for subject in ('=?iso-8859-1?Q?Viele_Gr=FC=DFe?=', 'Viele GRÜSSE',
                        '=?utf-8?b?R3LDvMOf?=\r\n =?utf-8?q?e?= an alle'):
            with self.subTest(subject):
                self.assertFalse(self.run_mail(mail_bytes(subject)))

    def test_a_subject_that_cannot_be_decoded_goes_on(self):
        self.begin('toner')
        for subject in ('=?utf-8?b?abcde?=', '=?nonsense?q?x?=',
                        '=?utf-8?q?=FF?=', '=?\0?q?x?=', '=?undefined?q?x?='):
            with self.subTest(subject):
                self.assertTrue(self.run_mail(mail_bytes(subject)))

    def test_an_empty_text_discards_nothing(self):
        self.begin(' | toner ||')
        self.assertTrue(self.run_mail(mail_bytes('Hello')))

    def test_without_a_text_it_stays_off(self):
        for contains in ('', ' | '):
            self.log = Log()
            self.assertStaysOff(DiscardSubject, {
                'enabled': 'true', 'contains': contains}, 'contains=')


if __name__ == '__main__':
    unittest.main()
