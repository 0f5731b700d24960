"""Nothing that was answered 250 is lost, whenever the power goes: lives of a
mail are recorded, and a fresh proxy starts on all that a crash before each of
their file operations may leave (see tests/crash.py)."""
import collections
import os
import re
import subprocess
import sys
import tempfile
from unittest import mock

import smtpproxy
from tests.case import A, B, FolderCase, ProxyCase, SENDER
from tests.crash import FOLDER, TOP, Disk, Recorder, restore
from tests.fakes import wait_until

SMALL_BODY = b'hello\r\n'
LARGE_BODY = b'all of it\r\n' * 20000 + b'the end\r\n'
SMALL = b'Subject: small\r\n\r\n' + SMALL_BODY
LARGE = b'Subject: large\r\n\r\n' + LARGE_BODY
CHANGES = ('[handler rewriteaddress]\nenabled=true\nto %s=%s\n' % (B, A)
           + 'from %s=%s\n' % (SENDER, SENDER.replace('home', 'new')))
LOOKS = '[handler discardsubject]\nenabled=true\ncontains=toner\n'
LATER = '451 4.3.0 later'
NOTES = 'promised', 'deleted', 'delivered', 'settled'


class Told:
    """What the world knows: promised and deleted are sets of ids, delivered
    and recorded (the proxy noted that it was) sets of (id, recipient)."""

    def __init__(self):
        self.promised, self.deleted = set(), set()
        self.delivered, self.recorded = set(), set()

    def hear(self, note, what):
        """settled: the log tells how a try ended, so that is on disk."""
        if note == 'settled':
            self.recorded |= self.delivered
        else:
            getattr(self, note).add(what)

    def see(self, operation, *names):
        """It is noted when a line that was added to ID.mail is synced."""
        if operation == 'fsync' and names[0].endswith('.mail'):
            self.recorded |= {(id, to) for id, to in self.delivered
                              if id in names[0]}


class CrashCase(ProxyCase):
    """live() records a life, survives() goes through its crashes."""
    points = states = recoveries = 0

    @classmethod
    def tearDownClass(cls):
        print('\n%d crash points, %d states of the disk, %d starts on them'
              % (cls.points, cls.states, cls.recoveries), file=sys.stderr)

    def setUp(self):
        super().setUp()
        self.handlers, self.to, self.known = '', [A], {}
        unsynced = mock.patch('os.fsync')   # the model has its own
        unsynced.start()
        self.addCleanup(unsynced.stop)

    def begin(self, folder):
        """A proxy on folder/msgs that looks round all the time."""
        settings = smtpproxy.load(self.ini(
            accounts={'default': self.account()}, more=self.handlers))
        self.proxy = smtpproxy.Proxy(settings._replace(
            config=settings.config._replace(
                msgdir=os.path.join(folder, 'msgs'), sleeptime=0.02)))
        self.addCleanup(self.stop)
        self.proxy.start()

    def all_gone(self):
        """Returns once no mail is left in msgs/."""
        folder = self.proxy.spool.folder
        wait_until(lambda: not any(
            name.endswith('.mail') for name in os.listdir(folder)))

    def live(self, life, new=False):
        """The timeline of a life; new: msgs/ does not exist before it."""
        root = tempfile.mkdtemp(dir=self.folder)
        if not new:
            os.mkdir(os.path.join(root, 'msgs'))
        with Recorder(root) as recorder:
            self.begin(root)
            self.note = recorder.note
            self.listen_in()
            life(self)
            self.stop()
        self.assertEqual(*self.real_and_modelled(root, recorder.timeline, new))
        self.upstream.script.clear()
        del self.upstream.record
        return recorder.timeline

    def listen_in(self):
        """Notes what is promised before anybody can act on it."""
        announce, record = self.proxy.relay.announce, self.upstream.record

        def promised(id, *more):
            self.note('promised', id)
            announce(id, *more)

        def recorded(kind, item):
            if kind == 'mails':
                for recipient in item.to:
                    self.note('delivered', (id_of(item), recipient))
            record(kind, item)
        self.proxy.relay.announce = promised
        self.upstream.record = recorded

    def real_and_modelled(self, root, timeline, new):
        """The names in msgs/: does the model know of everything?"""
        disk = blank(new)
        for event in timeline:
            if event[0] not in NOTES:
                disk.apply(*event)
        real = [os.path.relpath(os.path.join(folder, name), root)
                for folder, folders, files in os.walk(root)
                for name in folders + files]
        return sorted(real), sorted(disk.names)

    def survives(self, life, journal=True, new=False):
        """Nothing is lost or wrong, whenever the life ends."""
        timeline, told, disk = self.live(life, new), Told(), blank(new)
        wrong = []
        for number, event in enumerate(timeline + [('the', 'end')]):
            type(self).points += 1
            for kind, state in disk.after_crash(journal):
                type(self).states += 1
                wrong += ['%s, crash before %s %s (%d), unsynced: %s, left: %s'
                          % (what, *event[:2], number, kind, sorted(state))
                          for what in self.judge(told, kind, state)]
            if event[0] in NOTES:
                told.hear(*event)
            elif event != ('the', 'end'):
                disk.apply(*event)
                told.see(*event)
        self.assertEqual([], wrong[:3], '%d in all' % len(wrong))

    def judge(self, told, kind, state):
        """What is wrong with a start on this state of the disk."""
        key = frozenset(state.items())
        if key not in self.known:
            self.known[key] = self.recover(state)
        arrived, left = self.known[key]
        due = {(id, to) for id in told.promised - told.deleted
               for to in self.to} - told.delivered
        wrong = ['lost: %s' % (mail,) for mail in due - set(arrived)]
        wrong += ['sent again: %s' % (mail,)
                  for mail in told.recorded & set(arrived)]
        wrong += ['sent twice: %s' % (mail,)
                  for mail, times in arrived.items() if times > 1]
        # Of zeros nobody can tell what they were.
        return wrong + ['still there: %s' % name for name in left
                        if not (name.startswith('corrupt')
                                and kind in ('zeros', 'hole'))]

    def recover(self, state):
        """Starts a proxy on what a crash left. Returns what arrived, a
        Counter of (id, recipient), and the files that are left."""
        type(self).recoveries += 1
        root, before = tempfile.mkdtemp(dir=self.folder), len(
            self.upstream.mails)
        restore(state, root)
        msgs = os.path.join(root, 'msgs')
        if any(b'"parked": true' in file for file in state.values()
               if file is not FOLDER):
            smtpproxy.Spool(msgs).ask('all', 'retry')
        self.begin(root)
        self.all_gone()
        self.stop()
        mails = self.upstream.mails[before:]
        for mail in mails:
            self.assertIntact(mail)
        left = [os.path.join(os.path.relpath(folder, msgs), name)
                for folder, _, names in os.walk(msgs) for name in names]
        return collections.Counter(
            (id_of(mail), to) for mail in mails for to in mail.to), [
                name for name in left if name
                and not name.startswith('asked')]

    def assertIntact(self, mail):
        """It is one of ours, whole, and as the handlers wanted it."""
        _, _, body = mail.data.partition(b'\r\n\r\n')
        self.assertTrue(body in (SMALL_BODY, LARGE_BODY), mail.data[:999])
        self.assertEqual([], self.upstream.violations)
        self.assertTrue(set(mail.to) <= set(self.to), mail.to)
        if self.handlers == CHANGES:
            self.assertEqual('printer@new.lan', mail.sender)


def blank(new):
    """A Disk, unless new with a msgs/ on it."""
    disk = Disk()
    if not new:
        disk.names['msgs'] = disk.lasting['msgs'] = FOLDER
    return disk


def id_of(mail):
    match = re.search(rb'\sid ([0-9a-f]{8}-[0-9a-f]{5})', mail.data)
    return match[1].decode() if match else 'damaged'


# --- Lives of a mail --------------------------------------------------------

def small(case):
    case.submit(SMALL)
    case.all_gone()


def large(case):
    case.submit(LARGE)
    case.all_gone()


def one_after_the_other(case):
    small(case)
    large(case)
    small(case)


def readdressed(case):
    case.submit(SMALL, to=[B])
    case.all_gone()


def readdressed_large(case):
    case.submit(LARGE, to=[B])
    case.all_gone()


def tried_in_vain(case, replies, to):
    """The first try of a small mail; returns its id."""
    case.upstream.script.update(replies)
    id = case.submit(SMALL, to=to)
    case.assertLogged(id, 'not delivered' if LATER in str(replies) else 'kept')
    case.note('settled', id)
    return id


def asked(case, id, what):
    """What the owner asks for with --retry or --delete, done."""
    path = smtpproxy.Spool(case.proxy.spool.folder).ask(id, what)
    wait_until(lambda: not os.path.exists(path))


def retried(case):
    """The second recipient is accepted at the third try only."""
    id = tried_in_vain(case, {'RCPT TO:<b@': [LATER, LATER, None]}, [A, B])
    asked(case, id, 'retry')
    case.assertLogged(id, 'try 2')
    case.note('settled', id)
    asked(case, id, 'retry')
    case.all_gone()


def parked(case):
    """One recipient is accepted, one refused for good: until asked for."""
    id = tried_in_vain(case, {'RCPT TO:<b@': ['550 5.1.1 no', None]}, [A, B])
    asked(case, id, 'retry')
    case.all_gone()


def deleted(case):
    id = tried_in_vain(case, {'MAIL': LATER}, [A])
    case.note('deleted', id)
    asked(case, id, 'delete')
    case.all_gone()


def started_again(case):
    """A stop and a start between two tries."""
    tried_in_vain(case, {'RCPT TO:<b@': [LATER, None]}, [A, B])
    root = os.path.dirname(case.proxy.spool.folder)
    case.stop()
    case.begin(root)
    case.all_gone()


class EveryCrash(CrashCase):
    """Whenever the power goes in the life of ..., each recipient of a mail
    that was answered 250 gets it, whole, and no second time if the spool has
    noted that he has it."""

    def test_a_small_mail(self):
        self.survives(small)

    def test_a_large_mail(self):
        self.survives(large)

    def test_a_mail_and_those_after_it(self):
        self.survives(one_after_the_other)

    def test_a_mail_that_a_handler_changes(self):
        self.handlers = CHANGES
        self.survives(readdressed)

    def test_a_large_mail_that_a_handler_changes(self):
        self.handlers = CHANGES
        self.survives(readdressed_large)

    def test_a_mail_that_a_handler_looks_at(self):
        self.handlers = LOOKS
        self.survives(small)

    def test_a_mail_whose_second_recipient_is_retried(self):
        self.to = [A, B]
        self.survives(retried)

    def test_a_mail_that_is_parked_and_asked_for(self):
        self.to = [A, B]
        self.survives(parked)

    def test_a_mail_that_the_owner_deletes(self):
        self.survives(deleted)

    def test_a_mail_that_waits_over_a_restart(self):
        self.to = [A, B]
        self.survives(started_again)

    def test_the_first_mail_of_all(self):
        """msgs/ itself is new, and its name not yet safe."""
        self.survives(small, new=True)

    def test_a_retried_mail_on_a_disk_without_a_journal(self):
        """Such a disk forgets any of the names that were not synced."""
        self.to = [A, B]
        self.survives(retried, journal=False)


class Death(FolderCase):
    """A process that really ends before its n-th operation."""

    def test_the_spool_loses_nothing_wherever_it_dies(self):
        subprocess.run([sys.executable, '-m', 'tests.crash', '--folder',
                        self.folder], cwd=TOP, check=True, timeout=30)

        deaths = [self.path(name) for name in os.listdir(self.folder)]
        for root in sorted(deaths):
            with self.subTest(root):
                self.assertSafe(root)
        print('\n%d real deaths' % len(deaths), file=sys.stderr)
        self.assertGreater(len(deaths), 20)

    def assertSafe(self, root):
        """What was told is there, what was half done is not."""
        with open(os.path.join(root, 'told')) as file:
            told = file.read().split()
        mail = self.find(root)
        if mail is None:
            self.assertTrue('promised' not in told or 'saved' in told)
            return
        self.assertIn(b'a line of many\r\n' * 10000, mail.msg)
        self.assertTrue('replaced' not in told or mail.handled)
        self.assertEqual(mail.handled, b'life' in mail.msg)
        self.assertTrue('saved' not in told or len(mail.to) == 1)

    @staticmethod
    def find(root):
        """The one mail that a start finds, or None."""
        spool = smtpproxy.Spool(os.path.join(root, 'msgs'))
        spool.open()
        try:
            found = spool.start()
            return spool.load(found[0]) if found else None
        except smtpproxy.Unfinished:
            return None
        finally:
            spool.close()
