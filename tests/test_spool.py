"""Spool, Draft and Mail: what is on disk, and what a start makes of it."""
import contextlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
import zlib
from unittest import mock

import smtpproxy
import smtps
from smtpproxy import Spool, Unfinished, Unreadable
from tests import fuzz
from tests.case import A, B, SENDER, FolderCase
from tests.crash import TOP
from tests.fakes import Clock

CONTENT = b'Subject: test\r\n\r\nhello\r\n'
DAY = 86400


class SpoolCase(FolderCase):
    """A folder msgs/ and, after a start, self.spool on it."""

    def setUp(self):
        super().setUp()
        self.spool = None
        self.addCleanup(self.stop)
        unsynced = mock.patch('os.fsync')   # see tests/deep_crash.py
        unsynced.start()
        self.addCleanup(unsynced.stop)

    def start(self, clock=time.monotonic):
        """A service begins to work on msgs/; returns the ids it finds."""
        self.stop()
        self.spool = Spool(self.path('msgs'), clock)
        self.spool.open(patience=0)
        return self.spool.start()

    def stop(self):
        if self.spool:
            self.spool.close()

    def store(self, content=CONTENT, sender=SENDER, to=(A,), parameters=None):
        """A mail that is safe; returns its id."""
        draft = self.spool.draft(sender, list(to), parameters or {})
        draft.write(content)
        draft.seal()
        draft.commit()
        draft.release()
        return draft.id

    def content(self, id, kind='mail'):
        with open(self.path('msgs', '%s.%s' % (id, kind)), 'rb') as file:
            return file.read()

    def names(self, *folder):
        """What is in msgs/ but for the lock."""
        return sorted(set(os.listdir(self.path('msgs', *folder))) - {'.lock'})

    def assertSetAside(self, *names):
        """These and no others are in corrupt/, and not in msgs/."""
        self.assertEqual(sorted(names), self.names('corrupt'))
        self.assertFalse(set(names) & set(self.names()))


class Files(SpoolCase):
    """What was stored can be read: by the next start, by another program, by
    a person."""

    def setUp(self):
        super().setUp()
        self.start()

    def test_a_mail_is_batch_smtp_that_a_person_can_read(self):
        id = self.store(b'Subject: x\r\n\r\n..dot\r\n', to=[A, B])

        text = self.content(id).decode()

        self.assertRegex(text, r'''(?x)\A
            MAIL\ FROM:<printer@home.lan>\r\n
            RCPT\ TO:<a@example.org>\r\nRCPT\ TO:<b@example.org>\r\n
            DATA\r\nSubject:\ x\r\n\r\n\.\.dot\r\n\.\r\n
            NOOP\ crc32=[0-9a-f]{8}\r\n\Z''')

    def test_envelope_and_message_come_back_as_they_were(self):
        for content in (CONTENT, b'\r\n', b'\r\n..\r\n', b'A: b\r\n\r\n',
                        b'A: \xff\0\r\n\r\n\xe4' * 50000 + b'\r\n'):
            with self.subTest(content[:20]):
                mail = self.spool.load(self.store(content, to=[A, B]))

                self.assertEqual((SENDER, [A, B]), (mail.frm, mail.to))
                self.assertEqual(smtps.unstuffed(content), mail.msg)
                self.assertIsNone(mail.verify())

    def test_every_address_that_smtp_knows_comes_back(self):
        for address in ('', 'root', 'dot.@hp.lan', 'grüße@bücher.example',
                        '"a b"@home.lan', r'"q\"x\\y"@home.lan',
                        '"x>y<z"@home.lan', 'a@[IPv6:::1]', 'x' * 300 + '@y',
                        "o'neil+tag=1%x!y@home.lan", '"@"@home.lan'):
            with self.subTest(address):
                id = self.store(sender=address, to=[address or A, A])

                mail = self.spool.load(id)

                self.assertEqual(address, str(mail.frm))
                self.assertEqual([address or A, A], list(map(str, mail.to)))

    def test_what_the_listener_takes_is_what_is_stored(self):
        dice = random.Random(14)
        for _ in range(1500):
            with contextlib.suppress(smtps.Refused):
                said = '<%s>' % fuzz.address(dice)
                address, _ = smtps.parse_path(said, '5.1.7')
                mail = self.spool.load(self.store(
                    sender=address, to=[address or A]))
                self.assertEqual(
                    (address, [address or A], ''),
                    (str(mail.frm), list(map(str, mail.to)), mail.flaw), said)
                self.spool.remove(mail)

    def test_what_would_not_be_taken_today_is_kept_and_said(self):
        """Mail of an earlier version; issue 14."""
        for bad in '@relay:boss@x', 'a"b@x', '"abc', 'a@x"', 'a@x> RET=<b':
            for frm, to in (bad, A), (SENDER, bad):
                with self.subTest(bad, sender=frm):
                    mail = self.spool.load(self.store(sender=frm, to=[to]))

                    self.assertIn('<%s>' % bad, mail.flaw)
                    self.assertEqual((frm, [to]), (
                        str(mail.frm), list(map(str, mail.to))))

    def test_a_thousand_recipients(self):
        everybody = ['user%d@example.org' % n for n in range(1000)]

        mail = self.spool.load(self.store(to=everybody))

        self.assertEqual(everybody, mail.to)

    def test_what_the_client_said_of_8_bits_and_utf8_is_kept(self):
        id = self.store(parameters={
            'BODY': '8BITMIME', 'SMTPUTF8': '', 'SIZE': '7', 'RET': 'FULL'})

        mail = self.spool.load(id)

        self.assertEqual({'BODY': '8BITMIME', 'SMTPUTF8': ''},
                         mail.parameters)

    def test_nobody_else_may_look_at_the_files(self):
        id = self.store()
        mail = self.spool.load(id)
        self.spool.save(mail)

        for name, mode in (('', 0o700), (id + '.mail', 0o600)):
            with self.subTest(name):
                found = os.stat(self.path('msgs', name)).st_mode & 0o777
                self.assertEqual(oct(mode), oct(found))

    def test_a_mail_that_is_given_up_leaves_nothing(self):
        for content in (CONTENT, CONTENT * 10000):
            with self.subTest(len(content)):
                draft = self.spool.draft(SENDER, [A], {})
                draft.write(content)

                draft.abort()

                self.assertEqual([], self.names())

    def test_ids_are_new_and_in_order(self):
        ids = [self.spool.draft(SENDER, [A], {}).id for _ in range(1000)]

        self.assertEqual(1000, len(set(ids)))
        self.assertTrue(all(Spool.ID.fullmatch(id) for id in ids))
        self.assertEqual(sorted(id[:8] for id in ids),
                         [id[:8] for id in ids])

    def test_mails_that_are_synced_together_share_the_sync_of_the_folder(self):
        drafts = [self.spool.draft(SENDER, [A], {}) for _ in range(3)]
        for draft in drafts[:2]:
            draft.seal()

        with mock.patch.object(self.spool, 'sync') as sync:
            drafts[0].commit()
            drafts[1].commit()
            self.assertEqual(1, sync.call_count)
            drafts[2].seal()                # a name that came later
            drafts[2].commit()
            self.assertEqual(2, sync.call_count)

    def test_a_folder_that_was_not_synced_is_synced_for_the_next(self):
        drafts = [self.spool.draft(SENDER, [A], {}) for _ in range(2)]
        for draft in drafts:
            draft.seal()

        with mock.patch.object(self.spool, 'sync', side_effect=OSError):
            self.assertRaises(OSError, drafts[0].commit)

        with mock.patch.object(self.spool, 'sync') as sync:
            drafts[1].commit()
        sync.assert_called_once_with()

    def test_a_mail_is_seen_once_it_is_promised_and_not_before(self):
        draft = self.spool.draft(SENDER, [A], {})
        draft.write(CONTENT * 10000)
        before = self.spool.scan()

        draft.seal()
        draft.commit()
        draft.release()

        self.assertEqual(([], [draft.id]), (before, self.spool.scan()))

    def test_what_handlers_made_of_a_mail_takes_its_place(self):
        id = self.store(parameters={'BODY': '8BITMIME'})
        mail = self.spool.load(id)
        mail.frm, mail.to, mail.msg = B, [B], b'Subject: new\n\n.\nend'

        self.spool.replace(mail)

        new = self.spool.load(id)
        self.assertEqual((B, [B], True), (new.frm, new.to, new.handled))
        self.assertEqual(b'Subject: new\r\n\r\n.\r\nend\r\n', new.msg)
        self.assertEqual([id + '.mail'], self.names())
        self.assertIsNone(new.verify())


class State(SpoolCase):
    """What is known of a mail in trouble lasts."""

    def setUp(self):
        super().setUp()
        self.start()
        self.id = self.store(to=[A, B])
        self.mail = self.spool.load(self.id)

    def test_it_is_there_after_a_restart(self):
        self.mail.to, self.mail.refused = [B], {A: '550 no'}
        self.mail.tries, self.mail.problem = 3, 'grüße\r\n\0'
        self.mail.parked = True
        self.spool.save(self.mail)

        self.start()

        mail = self.spool.load(self.id)
        self.assertEqual(([B], {A: '550 no'}, 3, 'grüße\r\n\0', True), (
            mail.to, mail.refused, mail.tries, mail.problem, mail.parked))

    def test_what_2_0_knows_it_can_still_read(self):
        """It passes over a line with a name that it does not know."""
        known = {'to', 'refused', 'tries', 'due', 'problem', 'handled',
                 'parked', 'seen'}
        self.mail.to, self.mail.parked, self.mail.unanswered = [B], True, 2
        self.spool.save(self.mail)

        with open(self.mail.path, 'rb') as file:
            first, second = [json.loads(line) for line in re.findall(
                rb'NOOP state=({.*}) crc32', file.read())]

        self.assertEqual(({'to': [B], 'parked': True}, {'unanswered': 2}), (
            {key: first[key] for key in set(first) - {'seen'}},
            {key: second[key] for key in set(second) - {'seen'}}))
        self.assertLessEqual(set(first), known)

    def test_it_is_small_beside_a_large_mail(self):
        mail = self.spool.load(self.store(CONTENT * 100000))
        before = os.path.getsize(mail.path)

        for mail.tries in range(1, 10):
            self.spool.save(mail)

        self.assertLess(os.path.getsize(mail.path) - before, 9 * 150)
        self.assertEqual(9, self.spool.load(mail.id).tries)

    def test_it_goes_with_the_mail(self):
        self.spool.save(self.mail)

        self.spool.remove(self.mail)

        self.assertEqual([], self.names())
        self.assertIsNone(self.spool.load(self.id))

    def test_one_that_is_not_whole_does_not_count(self):
        """A crash, or a full disk, in the middle of a line."""
        self.mail.to = [B]
        self.spool.save(self.mail)
        with open(self.mail.path, 'rb') as file:
            whole = file.read()
        begin = whole.rindex(b'NOOP state=')
        for end in range(begin, len(whole) - 1):
            for tail in b'', b'\0' * (len(whole) - end):
                self.write(self.mail.path, whole[:end] + tail)
                mail = self.spool.load(self.id)
                self.assertEqual([A, B], mail.to)

        mail.tries = 4
        self.spool.save(mail)

        self.assertEqual(4, self.spool.load(self.id).tries)

    def test_one_with_strange_fields_does_not_count(self):
        for line in (b'{"to": 7}', b'{"x": 1}', b'{"tries": "x"}', b'{}'):
            with self.subTest(line):
                with open(self.mail.path, 'ab') as file:
                    file.write(b'NOOP state=%s crc32=%08x\r\n' % (
                        line, zlib.crc32(line)))

                self.assertEqual([A, B], self.spool.load(self.id).to)

    def test_the_end_of_its_file_tells_whether_it_may_be_parked(self):
        self.spool.save(self.mail)
        self.assertFalse(self.spool.may_be_parked(self.id))

        self.mail.to, self.mail.problem = [A] * 300, 'x' * 9000
        self.mail.parked = True
        self.spool.save(self.mail)

        self.assertTrue(self.spool.may_be_parked(self.id))

    def test_one_that_only_we_remember_as_parked_may_be(self):
        self.mail.parked = True
        with mock.patch('os.write', side_effect=OSError('full')):
            with self.assertLogs('smtpproxy', 'ERROR'):
                self.spool.save(self.mail)

        self.assertTrue(self.spool.may_be_parked(self.id))
    def test_an_earlier_version_reads_all_that_it_knows(self):
        """Else accepted recipients would come back after a downgrade."""
        old = {'to', 'refused', 'tries', 'due', 'problem', 'handled',
               'parked', 'seen'}
        self.mail.to, self.mail.holds, self.mail.since = [B], True, 7.5
        self.spool.save(self.mail)

        with open(self.mail.path, 'rb') as file:
            states = [set(json.loads(line)) for line in re.findall(
                rb'NOOP state=(\{.*\}) crc32', file.read())]

        self.assertEqual([{'to', 'seen'}, {'holds', 'since', 'seen'}], states)
        self.assertLessEqual(states[0], old)
        mail = self.spool.load(self.id)
        self.assertEqual(([B], True, 7.5), (mail.to, mail.holds, mail.since))

    def test_when_the_disk_refuses_it_is_remembered(self):
        self.mail.to = [B]

        with mock.patch('os.write', side_effect=OSError('full')):
            with self.assertLogs('smtpproxy', 'ERROR'):
                self.spool.save(self.mail)

        self.assertEqual([B], self.spool.load(self.id).to)

    def test_a_delivered_mail_that_cannot_be_removed_is_not_found_again(self):
        with mock.patch('os.unlink', side_effect=OSError('read-only')):
            with self.assertLogs('smtpproxy', 'ERROR'):
                self.spool.remove(self.mail)

        self.assertIsNone(self.spool.load(self.id))
        self.spool.retry_removals()
        self.assertEqual([], self.names())


class Start(SpoolCase):
    """What a start makes of what is there."""

    def leave(self, name, text):
        """A file in msgs/ that some earlier service left."""
        return self.write(os.path.join('msgs', name), text)

    def a_mail(self, **options):
        """The bytes of a good mail."""
        self.start()
        id = self.store(**options)
        text = self.content(id)
        self.spool.remove(self.spool.load(id))
        return text

    def test_a_promised_mail_is_found(self):
        text = self.a_mail()
        self.leave('5fb0f000-00001.mail', text)
        self.leave('5fb0f000-00000.mail', text)

        found = self.start()

        self.assertEqual(['5fb0f000-00000', '5fb0f000-00001'], found)
        self.assertEqual(CONTENT, self.spool.load(found[0]).msg)

    def judged(self, text):
        """What a start makes of a file: a Mail or the exception's class."""
        self.leave('5fb0f000-00000.mail', text)
        id, = self.start()
        try:
            return type(self.spool.load(id))
        except Exception as error:
            return type(error)

    def test_no_beginning_of_a_mail_is_taken_for_one(self):
        """It was never promised: the end is the promise."""
        text = self.a_mail(to=[A, 'grüße@x.org'])

        wrong = [length for length in range(len(text))
                 if self.judged(text[:length]) is not Unfinished]

        self.assertEqual([], wrong)

    def test_a_length_without_its_bytes_is_an_unfinished_mail(self):
        """What ext4 and XFS may make of an unsynced file."""
        text = self.a_mail()
        kept = (0, 4, 40, 100, len(text) - 1)

        wrong = [length for length in kept if self.judged(
            text[:length].ljust(len(text), b'\0')) is not Unfinished]

        self.assertEqual([], wrong)

    def test_a_mail_with_wrong_bytes_is_not_sent(self):
        text = self.a_mail(content=CONTENT * 5000)
        for place in (20, 100, len(text) // 2, len(text) - 30):
            with self.subTest(place):
                wrong = bytearray(text)
                wrong[place] ^= 1

                self.assertIs(Unreadable, self.judged(bytes(wrong)))

    def test_what_is_no_mail_cannot_be_read(self):
        text = self.a_mail()
        for wrong in (text.replace(b'MAIL FROM', b'HELO FROM'),
                      text.replace(b'RCPT TO', b'RCPT AT'),
                      text.replace(b'<a@', b'<a\n@'),
                      text.replace(b'<a@', b'<\xff@')):
            with self.subTest(wrong[:60]):
                self.assertIs(Unreadable, self.judged(wrong))

    def test_pickled_mail_of_1x_is_set_aside_and_never_run(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (evil,)
        evil = self.path('executed')
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with self.subTest(protocol):
                name = 'mail%d' % protocol
                self.leave(name, pickle.dumps(Evil(), protocol))

                with self.assertLogs('smtpproxy', 'ERROR') as logged:
                    self.start()

                self.assertIn('1.x', logged.output[0])
                self.assertIn(name, self.names('corrupt'))
                self.assertFalse(os.path.exists(evil))

    def test_whatever_is_not_ours_is_set_aside_and_kept(self):
        for name in ('notes.txt', 'mail', '5fb0f000-00000.mail~', '.hidden',
                     '5FB0F000-00000.mail', '5fb0f000-00000-1.mail',
                     'x.state', 'x.new'):
            self.leave(name, name)

        with self.assertLogs('smtpproxy', 'ERROR') as logged:
            found = self.start()

        self.assertEqual(([], 8), (found, len(logged.output)))
        self.assertEqual(8, len(self.names('corrupt')))
        with open(self.path('msgs', 'corrupt', 'notes.txt')) as file:
            self.assertEqual('notes.txt', file.read())

    def test_nothing_that_is_set_aside_replaces_another(self):
        for text in 'one', 'two', 'three':
            self.leave('notes', text)
            with self.assertLogs('smtpproxy', 'ERROR'):
                self.start()

        self.assertEqual(3, len(self.names('corrupt')))

    def test_odd_files_do_not_keep_it_from_starting(self):
        os.makedirs(self.path('msgs', 'folder'))
        os.symlink('nowhere', self.path('msgs', 'link'))
        os.mkfifo(self.path('msgs', 'pipe'))

        run = subprocess.run(       # a pipe could block it for ever
            [sys.executable, '-c', 'import sys, smtpproxy\n'
             's = smtpproxy.Spool(sys.argv[1])\ns.open()\n'
             's.start()', self.path('msgs')],
            cwd=TOP, timeout=5, stderr=subprocess.PIPE)

        self.assertEqual(0, run.returncode, run.stderr.decode())

    def test_what_was_half_replaced_is_swept(self):
        text = self.a_mail()
        self.leave('5fb0f000-00000.mail', text)
        self.leave('5fb0f000-00000.new', b'NOOP handled\r\n' + text)

        found = self.start()

        self.assertEqual(['5fb0f000-00000.mail'], self.names())
        self.assertFalse(self.spool.load(found[0]).handled)

    def test_a_second_process_is_refused_and_touches_nothing(self):
        self.start()
        self.leave('notes', 'x')

        second = Spool(self.path('msgs'))

        self.assertRaises(smtpproxy.Busy, second.open, patience=0)
        self.assertEqual(['notes'], self.names())

    def test_a_killed_service_leaves_no_lock_behind(self):
        subprocess.run(
            [sys.executable, '-c', 'import os, sys, smtpproxy\n'
             'smtpproxy.Spool(sys.argv[1]).open()\nos._exit(9)',
             self.path('msgs')], cwd=TOP, timeout=10)

        self.assertEqual([], self.start())

    def test_a_look_at_the_queue_changes_nothing(self):
        self.leave('notes', 'x')
        self.leave('5fb0f000-00000.mail', self.a_mail())
        self.stop()

        spool = Spool(self.path('msgs'))
        spool.load(spool.scan()[0])

        self.assertEqual(['5fb0f000-00000.mail', 'corrupt'], self.names())


class Time(SpoolCase):
    """A wrong clock neither expires mail nor makes it wait for ever."""

    def boot(self, date):
        """A start on a box that believes it is so many seconds after 1970;
        self.clock is its monotonic one."""
        self.clock = Clock(5.0)
        with mock.patch('smtpproxy.time.time', return_value=date):
            return self.start(self.clock)

    def test_age_is_the_time_that_a_service_ran(self):
        self.boot(0)
        id = self.store()

        self.clock.advance(3 * DAY)

        self.assertAlmostEqual(3 * DAY, self.spool.age(id), delta=2)

    def test_no_box_clock_makes_a_mail_old_or_young(self):
        for born, later in ((0, 1.7e9), (1.7e9, 0), (2.1e9, 1.7e9),
                            (1.7e9, 2.1e9), (4.2e9, 0)):
            with self.subTest(born=born, later=later):
                self.boot(born)
                id = self.store()
                self.clock.advance(100)

                found = self.boot(later)

                self.assertEqual([id], found)
                self.assertTrue(0 <= self.spool.age(id) < 102)
                self.clock.advance(5 * DAY)
                self.assertGreaterEqual(self.spool.age(id), 5 * DAY)
                self.spool.remove(self.spool.load(id))

    def test_a_jump_while_it_runs_is_not_noticed(self):
        self.boot(0)
        id = self.store()

        with mock.patch('smtpproxy.time.time', return_value=1.7e9):
            self.clock.advance(10)
            newer = self.store()

        self.assertLess(self.spool.age(id), 12)
        self.assertLess(id, newer)

    def test_new_mail_is_younger_than_what_was_found(self):
        self.boot(2.1e9)
        old = self.store()
        self.boot(0)

        new = self.store()

        self.assertLess(old, new)
        self.assertEqual([old, new], self.spool.scan())

    def test_age_lasts_over_many_restarts(self):
        """A box that is switched off every night gives up in the end."""
        self.boot(1.7e9)
        id = self.store()

        for _ in range(6):
            mail = self.spool.load(id)
            self.clock.advance(DAY)
            self.spool.save(mail)
            self.boot(1.7e9)
        self.spool.load(id)

        self.assertGreaterEqual(self.spool.age(id), 5 * DAY)


class Requests(SpoolCase):
    """What the queue commands ask for lies in asked/."""

    def test_they_are_found_by_the_service(self):
        self.start()
        id = self.store()

        asked = [self.spool.ask(id, 'retry'), self.spool.ask('all', 'retry'),
                 self.spool.ask(id, 'delete')]

        self.assertEqual(sorted(zip(asked, (id, 'all', id), (
            'retry', 'retry', 'delete'))), sorted(self.spool.asked()))

    def test_they_outlast_a_restart(self):
        self.start()
        self.spool.ask('all', 'retry')

        self.start()

        self.assertEqual(1, len(self.spool.asked()))

    def test_without_any_nothing_is_made(self):
        self.start()

        self.assertEqual([], self.spool.asked())
        self.assertEqual([], self.names())
