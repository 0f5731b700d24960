"""Relay: when each mail is tried, and what a failure means. Time is a Clock
that the tests move; servers are real sockets that follow a script."""
import contextlib
import errno
import os
import shutil
import socket
import threading
import time
import unittest
from unittest import mock

import smtpproxy
from tests.case import A, B, OTHER, SENDER, ProxyCase
from tests.fakes import DROP, HANG, Clock, FakePOP, FakeSMTP, wait_until

C = 'c@example.org'
DAY = 86400
LATER, NEVER = '451 4.3.0 later', '550 5.1.1 never'
MAIL = b'Subject: the report\r\n\r\nhello\r\n'


def unused_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


class RelayCase(ProxyCase):
    """A spool and a relay without the listener, in the time of self.clock."""

    def setUp(self):
        super().setUp()
        self.clock, self.relay = Clock(), None
        self.upstream.clock = self.clock
        self.gate = threading.Event()
        self.addCleanup(self.stop)
        self.addCleanup(self.gate.set)

    def begin(self, config=None, accounts=None):
        """Starts the relay, on what lies in msgs/."""
        self.settings = smtpproxy.load(self.ini(config, accounts))
        smtpproxy.open_log(self.settings)
        self.spool = smtpproxy.Spool(self.path('msgs'), self.clock)
        self.spool.open()
        self.relay = smtpproxy.Relay(
            self.spool, self.settings, smtpproxy.Handlers(self.settings),
            self.clock)
        self.relay.start(self.spool.start())

    def end(self):
        """Stops the relay, if it runs."""
        relay, self.relay = self.relay, None
        if relay:
            relay.stop(5)
            self.spool.close()

    def clear(self):
        """Stops the relay and empties msgs/ for the next row of a table."""
        self.end()
        shutil.rmtree(self.path('msgs'))

    def stop(self):
        self.end()
        super().stop()

    def wait_at_gate(self, _):
        """For a script: no reply before self.gate is set."""
        self.gate.wait(5)

    def put(self, to=(A,), sender=SENDER, content=MAIL):
        """A mail as a client hands it in; returns its id."""
        draft = self.spool.draft(sender, list(to), {})
        draft.write(content)
        draft.seal()
        draft.commit()
        draft.release()
        self.relay.announce(draft.id, sender, draft.id + ': accepted')
        return draft.id

    def advance(self, seconds):
        """Moves the time; returns when all who sleep have taken note."""
        self.clock.advance(seconds)
        for queue in self.relay.queues:
            with queue.changed:
                queue.changed.notify_all()
        wait_until(lambda: not any(
            self.may_take(queue) and not queue.in_hand
            for queue in self.relay.queues))

    def advance_until(self, condition, step):
        """Moves the time by steps until the condition holds; what is due is
        done with before the next step."""
        def stepped():
            if not condition():
                wait_until(self.at_rest)
                self.advance(step)
                wait_until(self.at_rest)
            return condition()
        return wait_until(stepped)

    def at_rest(self):
        """Whether nobody has anything to do now."""
        return not any(map(self.is_busy, self.relay.queues))

    def is_busy(self, queue):
        with queue.changed:     # what is taken is in hand at the same moment
            return queue.in_hand or self.may_take(queue)

    def may_take(self, queue):
        with queue.changed:
            now = self.clock()
            return max(getattr(queue, 'not_before', 0), getattr(
                queue, '_next_slot', 0)) <= now and any(
                    when <= now for when in queue.due.values())

    def in_hand(self):
        return [id for queue in self.relay.queues
                for id in list(queue.in_hand)]

    def reload(self, settings=None):
        """As SIGHUP does."""
        self.settings = settings or self.settings
        self.relay.reload(self.settings, smtpproxy.Handlers(self.settings))

    def tried(self, id, count):
        """Waits until a mail was tried so often and rests; returns it."""
        def find():
            mail = self.spool.load(id)
            if mail and mail.tries >= count and (
                    id not in self.in_hand()):
                return mail
        return wait_until(find)

    def verbs(self, verb, server=None):
        return [line for line in (server or self.upstream).commands
                if line.upper().startswith(verb.upper())]

    def assertGone(self):
        self.assertSpooled(0)
        wait_until(lambda: not self.in_hand())


class BackOff(RelayCase):

    def test_the_wait_doubles_up_to_an_hour_with_jitter(self):
        for sleeptime in 1, 30, 600:
            self.begin({'sleeptime': sleeptime})
            for tries in range(1, 40):
                with self.subTest(sleeptime=sleeptime, tries=tries):
                    plain = min(3600, sleeptime * 2 ** (tries - 1))
                    waits = {smtpproxy.back_off(tries, self.settings.config) for _ in range(50)}

                    self.assertGreaterEqual(min(waits), plain)
                    self.assertLessEqual(max(waits), min(3600, plain * 1.1))
                    self.assertEqual(plain < 3600, len(waits) > 1)
            self.end()

    def test_a_sleeptime_above_an_hour_is_respected(self):
        self.begin({'sleeptime': 7200})

        self.assertEqual([7200.0] * 3, [
            smtpproxy.back_off(tries, self.settings.config) for tries in (1, 2, 30)])

    def test_each_try_waits_longer_than_the_one_before(self):
        for kind, script in (('mail', {'RCPT': LATER}),
                             ('account', {'': '421 4.3.2 busy'})):
            with self.subTest(kind):
                self.upstream.script = script
                self.begin({'sleeptime': 10})
                id, times = self.put(), [self.clock.now]

                for tries in range(1, 6):
                    self.tried(id, tries)
                    times.append(self.clock.now)
                    self.advance_until(lambda: self.has_tries(
                        id, tries + 1), 2 ** (tries - 1))

                for n, (before, after) in enumerate(zip(times, times[1:])):
                    self.assertGreaterEqual(after - before, n and 5 * 2 ** n)
                self.assertLess(times[-1], times[0] + 10 * 31)
                self.clear()

    def has_tries(self, id, tries):
        mail = self.spool.load(id)
        return mail and mail.tries >= tries

    def test_the_first_retry_comes_after_sleeptime(self):
        self.upstream.script['RCPT'] = [LATER, None]
        self.begin({'sleeptime': 20})
        self.tried(self.put(), 1)
        start = self.clock.now

        self.advance(19.9)
        self.advance_until(lambda: self.upstream.mails, .5)

        second = self.verbs('RCPT')[1].time
        self.assertGreaterEqual(second, start + 20)
        self.assertLess(second, start + 23)

    def test_never_sooner_than_a_second(self):
        self.upstream.script['RCPT'] = [LATER, None]
        self.begin({'sleeptime': 1})
        self.tried(self.put(), 1)
        start = self.clock.now

        self.advance(.9)
        self.advance_until(lambda: self.upstream.mails, .05)

        self.assertGreaterEqual(self.verbs('RCPT')[1].time, start + 1)


class Parked(RelayCase):

    def park(self, script=None, config=None):
        """A mail that was given up; returns its id."""
        self.upstream.script = script or {'RCPT': NEVER}
        self.begin(dict({'sleeptime': 1}, **config or {}))
        id = self.put()
        wait_until(lambda: self.spool.load(id).parked and self.at_rest())
        return id

    def test_a_refused_mail_is_kept_with_all_the_owner_needs(self):
        id = self.park()

        line = self.assertLogged('ERROR', id, 'kept in msgs/')
        for word in (SENDER, A, 'the report', NEVER, '--retry ' + id):
            self.assertIn(word, line)

    def test_a_refusal_of_our_name_says_what_to_do(self):
        id = self.park({'RCPT': '504 5.5.2 <vm>: Helo command rejected'})

        self.assertLogged('ERROR', id, '504 5.5.2', 'set localhostname')

    def test_it_is_not_tried_by_itself(self):
        self.park()

        for _ in range(4):
            self.advance(1800)
        self.put()
        wait_until(lambda: len(self.verbs('MAIL')) > 1)
        self.assertEqual(2, len(self.verbs('MAIL')))

    def test_nor_after_a_restart(self):
        id = self.park()
        self.end()
        self.upstream.script.clear()
        self.begin({'sleeptime': 1})

        other = self.put([B])

        self.assertDelivered([B])
        self.assertSpooled(1)
        self.assertNotEqual(id, other)

    def test_it_is_tried_again_on_reload(self):
        id = self.park()
        self.upstream.script.clear()

        self.reload()

        self.assertDelivered([A])
        self.assertGone()
        self.assertLogged('INFO', id, 'sent to <%s>' % A)

    def test_on_reload_it_may_be_refused_again(self):
        id = self.park()

        self.reload()

        self.assertEqual(2, self.tried(id, 2).tries)
        wait_until(lambda: self.spool.load(id).parked)

    def test_a_reload_while_it_is_refused_is_not_forgotten(self):
        self.upstream.script['RCPT'] = [
            lambda talk: self.wait_at_gate(talk) or NEVER, None]
        self.begin({'sleeptime': 10})
        id = self.put()
        wait_until(lambda: self.verbs('RCPT'))

        self.reload()
        self.gate.set()
        self.assertLogged(id, 'refused for good')
        wait_until(self.at_rest)
        self.advance(10)

        self.assertDelivered([A])
        self.assertGone()

    def test_a_temporary_failure_is_parked_after_retrydays(self):
        for kind, script in (('mail', {'RCPT': LATER}),
                             ('account', {'': '421 4.3.2 busy'})):
            with self.subTest(kind):
                self.upstream.script = script
                self.begin({'sleeptime': 1, 'retrydays': 2})
                id = self.put()

                for day in range(1, 3):
                    tries = self.tried(id, day).tries
                    self.assertFalse(self.spool.load(id).parked)
                    self.advance(DAY)
                wait_until(lambda: self.spool.load(id).parked)

                self.assertGreaterEqual(tries, 2)
                self.assertLogged('ERROR', id, 'not delivered in 2 days',
                                  script.popitem()[1])
                self.clear()

    def test_mail_that_waits_for_the_account_is_parked_as_well(self):
        self.upstream.script[''] = '421 4.3.2 busy'
        self.begin({'sleeptime': 1, 'retrydays': 1})
        ids = [self.put() for _ in range(3)]
        self.tried(ids[0], 1)

        self.advance(DAY)

        for id in ids:
            wait_until(lambda: self.spool.load(id).parked)
            self.assertLogged('ERROR', id, 'not delivered in 1 days', '421')


class Restarted(RelayCase):

    def test_the_number_of_tries_is_kept(self):
        for kind, script in (('mail', {'RCPT': LATER}),
                             ('account', {'': '421 4.3.2 busy'})):
            with self.subTest(kind):
                self.upstream.script = script
                self.begin({'sleeptime': 10})
                id = self.put()
                for restart in range(1, 5):
                    self.assertEqual(restart, self.tried(id, restart).tries)
                    self.end()
                    self.begin({'sleeptime': 10})

                self.tried(id, 5)
                line = self.assertLogged(id, 'try 5')
                wait = int(line.partition(' in ')[2].split()[0])
                self.assertIn(wait, range(160, 177), line)
                self.clear()

    def test_who_has_the_mail_does_not_get_it_again(self):
        self.upstream.script['RCPT TO:<b@'] = LATER
        self.begin()
        id = self.put([A, B])
        self.tried(id, 1)
        self.end()
        self.upstream.script.clear()

        self.begin()

        self.assertDelivered([B], 2)
        self.assertGone()
        self.assertEqual([[A], [B]], [m.to for m in self.upstream.mails])


class Unanswered(RelayCase):
    """A server takes the mail and hangs up before its reply."""

    def tried_again(self, id, tries):
        self.advance_until(lambda: self.spool.load(id).tries >= tries, 5)
        wait_until(self.at_rest)

    def test_it_is_parked_after_the_third_copy_restarts_or_not(self):
        self.upstream.script['.'] = DROP
        self.begin({'sleeptime': 10})
        id = self.put()
        self.tried(id, 1)
        self.assertLogged('WARNING', id, 'it may have arrived', 'try 1')
        for tries in 2, 3:
            self.end()
            self.begin({'sleeptime': 10})
            self.tried_again(id, tries)

        self.advance(DAY)

        self.assertLogged('ERROR', id, 'it may have arrived, 3 times')
        self.assertTrue(self.spool.load(id).parked)
        self.assertEqual(3, len(self.verbs('DATA')))

    def test_the_owner_may_have_it_sent_again(self):
        self.upstream.script['.'] = [DROP] * 4 + [None]
        self.begin({'sleeptime': 1})
        id = self.put()
        self.tried_again(id, 3)

        self.reload()
        self.tried_again(id, 4)
        self.advance_until(lambda: self.upstream.mails, 1)

        self.assertGone()

    def test_what_ends_before_the_dot_or_is_answered_does_not_count(self):
        for stage in 'MAIL', 'DATA':
            self.upstream.script = {stage: DROP}
            self.begin({'sleeptime': 1})
            id = self.put()
            self.tried_again(id, 4)

            self.assertEqual(0, self.spool.load(id).unanswered)
            self.clear()


class LongLines(RelayCase):
    """A server that refuses what has lines of more than 998 bytes."""
    REFUSAL = '550 maximum allowed line length is 998 octets, got 8000'
    HEADER = b'Subject: x\r\nTo: ' + b'a@example.org, ' * 100 + b'b@x\r\n'

    def strict(self, config=None):
        def judge(talk):
            text = talk.server.seen[-1]
            too_long = max(map(len, text.split(b'\r\n'))) > 998
            return self.REFUSAL if too_long else None
        def read_data(talk):
            self.upstream.seen.append(usual(talk))
            return self.upstream.seen[-1]
        usual, self.upstream.seen = FakeSMTP.TALK.read_data, []
        patch = mock.patch.object(FakeSMTP.TALK, 'read_data', read_data)
        patch.start()
        self.addCleanup(patch.stop)
        self.upstream.script['.'] = judge
        self.begin(dict({'sleeptime': 10}, **config or {}))

    def test_the_mail_goes_again_at_once_with_lines_folded(self):
        self.strict({'deleteonerror': 'true'})
        for size in 8000, 300000:
            body = b'\r\n..\r\n' + b'QUJD' * (size // 4) + b'\r\n'
            with self.subTest(size):
                id = self.put(content=self.HEADER + body)

                self.assertGone()

                mail = self.upstream.mails[-1]
                self.assertEqual(
                    self.HEADER + body, mail.raw.replace(b'\r\n Q', b'Q')
                    .replace(b',\r\n a', b', a').replace(b'\r\n ', b''))
                self.assertLogged('INFO', id, 'lines folded', '998 octets')

    def test_what_is_signed_or_encrypted_is_parked_instead(self):
        self.strict()
        for header in (b'DKIM-Signature: v=1; a=x\r\n',
                       b'Content-Type: multipart/signed; boundary=x\r\n',
                       b'content-type: application/pkcs7-mime\r\n',
                       b'Content-Type: multipart/encrypted; boundary=x\r\n'):
            id = self.put(content=header + b'\r\n' + b'x' * 999 + b'\r\n')
            with self.subTest(header):
                wait_until(lambda: self.spool.load(id).parked)

                self.assertLogged('ERROR', id, 'refused for good', '998')
        self.assertEqual(4, len(self.verbs('DATA')))

    def test_a_refusal_that_folding_does_not_cure_is_one(self):
        for line, tries in (b'x' * 998, 1), (b'x' * 999, 2):
            self.upstream.script['.'] = '554 5.6.0 line too long'
            self.begin()
            before = len(self.verbs('DATA'))
            id = self.put(content=b'A: b\r\n\r\n' + line + b'\r\n')

            wait_until(lambda: self.spool.load(id).parked)

            self.assertEqual(tries, len(self.verbs('DATA')) - before)
            self.clear()


class TooMany(RelayCase):
    """A server that takes so many recipients with one mail."""

    def limited(self, reply, config=None):
        """Takes two; puts a mail to five, returns its id."""
        self.upstream.script['RCPT'] = lambda talk: (
            reply if len(talk.mail.to) == 2 else None)
        self.begin(dict({'sleeptime': 10}, **config or {}))
        return self.put(['%d@example.org' % n for n in range(5)])

    def test_all_have_the_mail_at_once(self):
        for reply in '552 5.5.3 too many', '452 4.5.3 too many':
            for delete in 'false', 'true':
                with self.subTest(reply, deleteonerror=delete):
                    self.limited(reply, {'deleteonerror': delete})

                    self.assertGone()

                    self.assertEqual([2, 2, 1], [
                        len(mail.to) for mail in self.upstream.mails])
                    self.upstream.mails.clear()
                    self.clear()

    def test_who_is_refused_when_alone_was_meant(self):
        self.upstream.script['RCPT TO:<b@'] = '552 5.2.2 mailbox full'
        self.begin()
        id = self.put([A, B])

        wait_until(lambda: self.spool.load(id).parked)

        self.assertLogged('ERROR', id, 'refused for good',
                          '552 5.2.2 mailbox full for <%s>;' % B)
        self.assertEqual([[A]], [mail.to for mail in self.upstream.mails])

    def test_nobody_gets_it_again_though_the_disk_is_full(self):
        with mock.patch.object(smtpproxy.Spool, '_append',
                               side_effect=OSError(28, 'disk full')):
            self.limited('552 too many')
            self.assertGone()

        self.assertEqual(5, sum(len(m.to) for m in self.upstream.mails))


class Absent(RelayCase):
    """A server that nobody can reach, or that says no."""

    def tried_in_vain(self, tries):
        """A mail that was tried so often; the next try is far away."""
        self.begin({'sleeptime': 10})
        id = self.put()
        self.advance_until(lambda: self.spool.load(id).tries >= tries, 10)
        return id

    def nobody(self, error):
        """As long as this context lasts no server can be reached."""
        return mock.patch('smtps.connect', side_effect=error)

    def test_mail_goes_soon_after_the_way_to_a_server_is_back(self):
        for error in (ConnectionRefusedError(errno.ECONNREFUSED, 'refused'),
                      OSError(errno.ENETUNREACH, 'Network is unreachable'),
                      OSError(errno.EHOSTUNREACH, 'No route to host'),
                      socket.gaierror(socket.EAI_AGAIN, 'try again')):
            with self.subTest(error):
                with self.nobody(error) as connect:
                    id = self.tried_in_vain(1)
                    self.advance_until(lambda: connect.call_count > 50, 10)
                back = self.clock.now

                self.advance_until(lambda: not self.spool.load(id), 10)

                self.assertLess(self.clock.now - back, 30)
                self.assertLogged('INFO', 'is there again')
                self.clear()

    def test_that_nobody_is_there_is_said_and_stored_once(self):
        with self.nobody(ConnectionRefusedError(111, 'refused')) as connect:
            id = self.tried_in_vain(1)
            size = os.path.getsize(self.path('msgs', id + '.mail'))

            self.advance_until(lambda: connect.call_count > 9, 10)

            self.assertEqual(1, self.log().count('refused; try 1'))
            self.assertEqual(size, os.path.getsize(
                self.path('msgs', id + '.mail')))
            self.assertLogged('WARNING', id, 'each 10 seconds')

    def test_no_pop_login_is_spent_while_nobody_takes_mail(self):
        pop = self.serve(FakePOP())
        self.begin({'sleeptime': 10}, {SENDER: self.account(
            smtpport=unused_port(), popbeforesmtp='true', pophost=pop.host,
            popport=pop.port, popssl='false', popusername='me',
            poppassword='pw', popcheckdelay=5)})
        self.tried(self.put(), 1)

        for _ in range(9):
            self.advance(10)
            wait_until(self.at_rest)

        self.assertEqual(1, pop.connections)

    def test_a_pop_server_is_missed_like_an_smtp_server(self):
        self.begin({'sleeptime': 10}, {SENDER: self.account(
            popbeforesmtp='true', pophost='127.0.0.1', popport=unused_port(),
            popssl='false', popusername='me', poppassword='pw')})
        id = self.put()
        self.tried(id, 1)

        with mock.patch('smtps.connect', wraps=smtpproxy.smtps.connect) as (
                connect):
            for _ in range(20):
                self.advance(10)
                wait_until(self.at_rest)

        self.assertGreater(connect.call_count, 15)
        self.assertEqual(0, self.upstream.connections)
        self.assertLogged('WARNING', id, 'POP login', 'each 10 seconds')
        self.assertEqual(1, self.log().count('refused; try 1'))

    def test_a_server_that_says_no_is_left_in_peace(self):
        self.upstream.script = {'': '421 4.3.2 busy'}
        self.tried_in_vain(4)
        before = self.upstream.connections

        for _ in range(6):
            self.advance(10)            # the next try is 80 seconds away
            wait_until(self.at_rest)

        self.assertEqual(before, self.upstream.connections)


class PopBeforeSMTP(RelayCase):
    """A POP login comes before the mail, and has to sink in."""

    def setUp(self):
        super().setUp()
        self.pop = self.serve(FakePOP(clock=self.clock))

    def begin(self, config=None, **keys):
        super().begin(dict({'waitafterpop': 5}, **config or {}), {
            SENDER: self.account(**dict({
                'popbeforesmtp': 'true', 'pophost': self.pop.host,
                'popport': self.pop.port, 'popssl': 'false',
                'popusername': 'me', 'poppassword': 'pw'}, **keys))})

    def assertAtRest(self, logins):
        """So many POP logins, and nobody has anything to do now."""
        self.pop.wait(logins)
        wait_until(self.at_rest)
        self.assertEqual(logins, len(self.pop.logins))

    def test_all_mail_goes_once_the_login_has_sunk_in(self):
        self.begin()
        for _ in range(3):
            self.put()
        self.assertAtRest(1)
        self.advance(4.9)
        self.assertEqual(0, self.upstream.connections)

        self.advance(.2)

        self.upstream.wait(3)
        self.assertGone()
        self.assertEqual(1, len(self.pop.logins))

    def test_a_stop_does_not_wait_for_that(self):
        for delete in 'false', 'true':
            with self.subTest(deleteonerror=delete):
                self.begin({'waitafterpop': 3600, 'deleteonerror': delete})
                self.put()
                self.pop.wait(1)
                start = time.monotonic()

                self.end()

                self.assertLess(time.monotonic() - start, 3)
                self.assertSpooled(1)
                self.assertNotLogged('stopped during a delivery')
                shutil.rmtree(self.path('msgs'))

    def opens(self, when):
        """For a script: relays from that time on only."""
        return lambda _: None if self.clock.now >= when else (
            '550 5.7.1 Relaying denied: authenticate with POP first')

    def seconds(self):
        """When the POP logins were, counted from the first."""
        return [int(at - self.pop.logins[0][1]) for _, at in self.pop.logins]

    def test_mail_goes_though_the_login_sinks_in_late(self):
        for delete in 'false', 'true':
            with self.subTest(deleteonerror=delete):
                self.upstream.script['RCPT'] = self.opens(self.clock.now + 15)
                self.begin({'deleteonerror': delete, 'waitafterpop': 1})
                for _ in range(3):
                    self.put()

                self.advance_until(lambda: len(self.upstream.mails) == 3, .5)

                self.assertGone()
                self.assertEqual([0, 1, 6], self.seconds())
                self.assertNotLogged('ERROR')
                self.clear()
                self.upstream.mails.clear()
                self.pop.logins.clear()

    def test_after_three_more_logins_the_refusal_counts(self):
        self.upstream.script['RCPT'] = '550 5.7.1 not today'
        for delete, word, kept in (('false', 'kept in msgs', 1),
                                   ('true', 'deleted', 0)):
            with self.subTest(deleteonerror=delete):
                self.begin({'deleteonerror': delete})
                id = self.put()
                self.advance_until(lambda: word in self.log(), 1)

                self.assertLogged('ERROR', id, word, '550 5.7.1 not today')
                self.assertSpooled(kept)
                self.assertEqual([0, 5, 10, 20], self.seconds())
                self.assertEqual(4, len(self.verbs('RCPT')))
                self.clear()
                self.pop.logins.clear()
                self.upstream.commands.clear()

    def test_who_has_taken_mail_since_the_login_knows_us(self):
        self.upstream.script['RCPT TO:<%s>' % B] = '550 who is that?'
        self.begin({'waitafterpop': 0})
        self.put()
        self.upstream.wait(1)

        id = self.put(to=(B,))

        self.assertLogged('ERROR', id, 'refused for good')
        self.assertEqual(1, len(self.pop.logins))

    def test_but_may_forget_us_before_the_login_is_old(self):
        self.begin({'waitafterpop': 0})
        self.put()
        self.upstream.wait(1)
        self.upstream.script['RCPT'] = ['554 5.7.1 Relay access denied', None]

        self.put()
        self.assertAtRest(2)
        self.advance(5)

        self.upstream.wait(2)

    def test_who_has_got_it_before_that_gets_it_once(self):
        self.upstream.script['RCPT TO:<%s>' % B] = ['550 5.7.1 no', None]
        self.upstream.script['RCPT TO:<%s>' % C] = '550 5.1.1 never'
        self.begin({'waitafterpop': 0})
        id = self.put(to=(A, B, C))
        self.assertAtRest(2)
        self.assertEqual(([B], [C]), (self.spool.load(id).to, list(
            self.spool.load(id).refused)))

        self.advance(5)

        self.assertEqual([[A], [B]], [m.to for m in self.upstream.wait(2)])
        self.assertLogged('ERROR', id, 'refused for good', '5.1.1 never')

    def test_nobody_gets_more_than_three_copies_for_it(self):
        self.upstream.script = {'RCPT TO:<%s>' % B: '550 relay not permitted',
                                '.': DROP}
        for delete, word in ('false', 'may have arrived, 3 times'), (
                'true', 'deleted'):
            with self.subTest(deleteonerror=delete):
                self.begin({'sleeptime': 10, 'deleteonerror': delete})
                id = self.put([A, B])

                self.advance_until(lambda: word in self.log(), 5)

                self.assertLogged('ERROR', id, word, A, B)
                self.assertEqual(3, len(self.verbs('DATA')))
                self.clear()
                self.upstream.commands.clear()

    def test_what_needs_the_owner_is_an_error_once_for_all_logins(self):
        self.upstream.script['.'] = '550 5.7.705 tenant has exceeded it'
        self.begin({'sleeptime': 10}, popcheckdelay=3000)
        id = self.put()

        self.advance_until(lambda: len(self.verbs('DATA')) > 3, 600)

        self.assertEqual(4, self.tried(id, 4).tries)
        self.assertEqual(4, len(self.pop.logins))
        self.assertEqual(1, self.log().count(' ERROR '))

    def test_a_login_of_one_connection_ends_no_wait_of_another(self):
        self.pop.script['PASS'] = lambda talk: self.wait_at_gate(talk)
        self.begin()
        self.put()
        wait_until(lambda: self.pop.commands[1:])
        destination, = self.relay.queues.destinations.values()
        limit = smtpproxy.AccountUnavailable('the limit is reached')
        destination.defer(3600, limit, 1, self.spool.now())
        self.gate.set()
        self.assertAtRest(1)

        self.advance(3599)

        self.assertLogged(self.put(), 'the limit is reached')
        self.assertEqual(0, self.upstream.connections)

    def test_what_comes_meanwhile_hears_what_it_waits_for(self):
        self.begin()
        self.put()
        self.assertAtRest(1)

        id = self.put()

        self.assertLogged('INFO', id, 'the POP login has to sink in')


class OneAccountAndAnother(RelayCase):

    def two(self, script, config=None):
        """An account in trouble, and OTHER's that is well."""
        self.well = self.serve(FakeSMTP(clock=self.clock))
        self.upstream.script = script
        self.begin(dict({'sleeptime': 10}, **config or {}), {
            SENDER: self.account(smtpconnections=1),
            OTHER: self.account(self.well)})

    def test_trouble_does_not_delay_the_other(self):
        for script in {'': '421 4.3.2 busy'}, {'': HANG}, {'EHLO': HANG}, (
                {'.': HANG}):
            with self.subTest(script=script):
                self.two(script)
                mine = self.put()
                wait_until(lambda: self.upstream.connections)

                self.put(sender=OTHER)

                self.assertDelivered([A], 1, self.well)
                self.assertSpooled(1)
                self.upstream.close()
                self.tried(mine, 1)
                self.clear()
                self.upstream = self.serve(FakeSMTP(clock=self.clock))

    def test_waiting_mails_do_not_each_try(self):
        self.two({'': '421 4.3.2 busy'})
        ids = [self.put() for _ in range(30)]
        first = self.tried(ids[0], 1)
        self.put(sender=OTHER)
        self.assertDelivered([A], 1, self.well)

        self.assertEqual(1, self.upstream.connections)
        self.assertIn('421', first.problem)
        self.assertLogged('WARNING', ids[0], '421 4.3.2 busy', 'try 1',
                          'next one in 10 seconds')

    def test_nor_does_one_that_comes_while_the_account_fails(self):
        self.two({'': lambda talk: (
            self.wait_at_gate(talk) or '421 4.3.2 busy')})
        first = self.put()
        wait_until(lambda: self.upstream.connections)
        self.put()

        self.gate.set()

        self.assertEqual(1, self.tried(first, 1).tries)
        wait_until(self.at_rest)
        self.assertEqual(1, self.upstream.connections)

    def test_one_try_a_turn_for_all_of_them(self):
        self.two({'': '421 4.3.2 busy'})
        ids = [self.put() for _ in range(9)]
        self.tried(ids[0], 1)

        for turn in range(2, 5):
            self.advance_until(
                lambda: self.upstream.connections >= turn, 2 ** turn)
            wait_until(lambda: not self.in_hand())

        self.assertEqual(4, self.upstream.connections)

    def test_all_go_as_soon_as_one_gets_through(self):
        self.two({'': ['421 4.3.2 busy', None]})
        ids = [self.put() for _ in range(6)]
        self.tried(ids[0], 1)

        self.advance_until(lambda: self.upstream.mails, 1)

        self.assertEqual(6, len(self.upstream.wait(6)))
        self.assertGone()
        self.assertEqual(2, self.upstream.connections)

    def test_an_account_that_was_well_again_begins_anew(self):
        self.two({'': ['421 a', '421 b', '421 c', None]})
        id = self.put()
        for tries in 1, 2, 3:
            self.tried(id, tries)
            self.advance_until(lambda: self.upstream.connections > tries, 5)
        self.assertDelivered([A])
        self.assertGone()
        self.end()
        self.upstream.script[''] = '421 d'
        self.begin({'sleeptime': 10})

        self.tried(self.put(), 1)

        self.assertLogged('421 d', 'try 1', 'in 10 seconds')

    def test_a_mail_that_gets_421_does_not_block_its_account(self):
        """Else one recipient that the server chokes on stops all mail."""
        self.two({'RCPT TO:<b@': '421 4.3.0 choked'})
        bad = self.put([B])
        good = [self.put() for _ in range(2)]
        self.tried(bad, 1)

        self.advance_until(lambda: len(self.upstream.mails) == 2, 5)

        self.assertSpooled(1)
        self.assertNotIn(bad, good)

    def test_new_mail_joins_those_that_wait(self):
        self.two({'': '421 4.3.2 busy'})
        self.tried(self.put(), 1)

        id = self.put()
        other = self.put(sender=OTHER)

        self.assertLogged('INFO', id, 'accepted; it waits with 1 more for',
                          '421 4.3.2 busy')
        self.assertNotIn('waits', self.assertLogged(other, 'accepted'))
        self.assertEqual(1, self.upstream.connections)


class Verdicts(RelayCase):

    SCRIPTS = (({'': '554 5.3.2 closed'}, 'waits'), ({'MAIL': LATER}, 'waits'),
               ({'RCPT': NEVER}, 'parked'), ({'DATA': NEVER}, 'parked'),
               ({'.': LATER}, 'waits'), ({'.': NEVER}, 'parked'),
               ({'AUTH': '535 5.7.8 no'}, 'waits'))

    def one_mail(self, script, deleteonerror, config=()):
        """A mail's id, of an account that signs in."""
        self.upstream.script = script
        account = self.account(smtpusername='me', smtppassword='pw')
        self.begin(dict({'deleteonerror': deleteonerror, 'sleeptime': 10},
                        **dict(config)), {SENDER: account})
        return self.put()

    def test_deleteonerror_true_deletes_with_an_error_that_says_all(self):
        for script, _ in self.SCRIPTS:
            with self.subTest(script=script):
                reply, = script.values()
                id = self.one_mail(script, 'true')

                self.assertGone()

                line = self.assertLogged('ERROR', id, 'deleted')
                for word in (SENDER, A, 'the report', reply):
                    self.assertIn(word, line)
                self.assertEqual([], os.listdir(self.path('msgs'))[1:])
                self.end()

    def test_deleteonerror_false_keeps_the_mail(self):
        for script, expected in self.SCRIPTS:
            with self.subTest(script=script):
                reply, = script.values()
                id = self.one_mail(script, 'false')

                mail = self.tried(id, 1)

                self.assertEqual(expected == 'parked', mail.parked)
                self.assertEqual(([A], 1), (mail.to, mail.tries))
                self.assertIn(reply, mail.problem)
                self.assertLogged(
                    'ERROR' if mail.parked or 'AUTH' in script else 'WARNING',
                    id, reply)
                self.clear()

    def test_each_recipient_has_a_verdict_of_its_own(self):
        self.upstream.script = {'RCPT TO:<b@': [LATER, None],
                                'RCPT TO:<c@': [NEVER, None]}
        self.begin({'sleeptime': 10})
        id = self.put([A, B, C])
        self.assertDelivered([A])
        mail = self.tried(id, 1)
        self.assertEqual(([B], [C]), (mail.to, list(mail.refused)))

        self.advance_until(lambda: len(self.upstream.mails) > 1, 1)
        self.assertDelivered([B], 2)
        wait_until(lambda: self.spool.load(id).parked)
        self.assertEqual([C], self.spool.load(id).to)

        self.reload()
        self.assertDelivered([C], 3)
        self.assertGone()

    def test_deleteonerror_true_names_only_those_without_the_mail(self):
        self.upstream.script = {'RCPT TO:<b@': LATER, 'RCPT TO:<c@': NEVER}
        self.begin({'deleteonerror': 'true'})

        id = self.put([A, B, C])

        self.assertDelivered([A])
        self.assertGone()
        line = self.assertLogged('ERROR', id, 'deleted', B, C, LATER, NEVER)
        self.assertNotIn(A, line)
        self.assertLogged('INFO', id, 'sent to <%s>' % A)

    def test_without_an_account_the_mail_is_kept_or_deleted_at_once(self):
        for deleteonerror, count in ('false', 1), ('true', 0):
            with self.subTest(deleteonerror=deleteonerror):
                self.begin({'deleteonerror': deleteonerror})

                id = self.put(sender='stranger@home.lan')

                self.assertLogged('ERROR', id, 'stranger@home.lan',
                                  'no account')
                self.assertSpooled(count)
                self.clear()

    def test_each_step_is_one_line_that_begins_with_the_id(self):
        self.begin()

        id = self.put()

        line = self.assertLogged('sent to')
        self.assertIn('INFO %s: sent to <%s> by %s:%d: 250 2.0.0 taken' % (
            id, A, self.upstream.host, self.upstream.port), line)


class Advised(RelayCase):
    """What is known of a reply counts, not its first digit alone."""

    LIMIT = ('554 5.7.0 The limit on the number of allowed outgoing messages '
             'was exceeded. Try again later.')
    CLOSED = '550 5.1.8 Access denied, bad outbound sender'

    def limited(self, script, count=1, **config):
        """The ids of so many mails; the first was tried."""
        self.upstream.script = script
        self.begin(dict({'sleeptime': 10}, **config))
        with self.relay.queues.unrouted.changed:    # all of them at once
            ids = [self.put() for _ in range(count)]
        wait_until(lambda: any(
            mail and mail.tries for mail in map(self.spool.load, ids))
            and self.at_rest())
        return ids

    def test_a_refusal_that_passes_by_itself_is_tried_again(self):
        self.upstream.script['RCPT'] = [
            '554 5.7.1 Client host [203.0.113.9] blocked using zen.spamhaus'
            '.org', None]
        self.begin({'sleeptime': 10})
        id = self.put()
        self.assertIn('block list', self.tried(id, 1).problem)

        self.advance_until(lambda: self.upstream.mails, 1)

        self.assertGone()

    def test_what_a_server_says_before_it_hangs_up_counts(self):
        id, = self.limited({'HELO': DROP, 'EHLO': (
            '501 5.5.4 HELO/EHLO argument box invalid, closing connection.')})

        self.assertLogged('ERROR', id, '501 5.5.4', 'set localhostname')

    def test_one_that_never_passes_is_parked_at_once(self):
        id, = self.limited({'MAIL': '451 4.1.0 invalid return path: not '
                                    'owned by user'})

        self.assertTrue(self.spool.load(id).parked)
        self.assertLogged('ERROR', id, 'advice: ', 'forcefrom')

    def test_a_421_means_what_its_words_say(self):
        for script, level, word, hour in (
                ({'DATA': '421 Domain box.example.org is not allowed to send:'
                          ' Sandbox subdomains are for test purposes only.'},
                 'ERROR', 'sandbox domain', True),
                ({'RCPT': '421 4.7.0 IP not in whitelist for RCPT domain, '
                          'closing connection.'},
                 'ERROR', 'smtp.gmail.com', True),
                ({'RCPT': '421 4.7.1 Greylisted, please try again later'},
                 'WARNING', 'this passes', False)):
            with self.subTest(script):
                id, = self.limited(script)
                before = len(self.verbs('MAIL'))

                self.advance(3000)
                wait_until(self.at_rest)

                self.assertLogged(level, id, *script.values(), word)
                self.assertEqual(hour, before == len(self.verbs('MAIL')))
                self.clear()

    def test_the_advice_stands_in_log_and_queue_once(self):
        self.begin()
        self.upstream.script['RCPT'] = '550 5.1.1 user unknown'

        id = self.put([A, B])

        line = self.assertLogged('ERROR', id, 'for <%s>, <%s>; advice' % (
            A, B))
        self.assertEqual(1, line.count('correct it in the device'))
        self.assertIn('; advice: ', self.spool.load(id).problem)

    def test_a_limit_of_the_sender_defers_the_account_for_an_hour(self):
        for stage in 'MAIL', 'RCPT', 'DATA', '.':
            with self.subTest(stage):
                before = len(self.verbs('MAIL'))
                self.limited({stage: self.LIMIT}, 20)

                self.advance(3000)
                wait_until(self.at_rest)

                self.assertLessEqual(       # of 20; one envelope went ahead
                    len(self.verbs('MAIL')) - before, 2)
                self.assertLogged('WARNING', 'next one in 3600 seconds')
                self.upstream.script.clear()
                self.advance_until(lambda: not self.spooled(), 300)
                self.clear()

    def test_who_has_the_mail_before_a_limit_does_not_get_it_again(self):
        self.upstream.script['RCPT TO:<b@'] = [self.LIMIT, None]
        self.begin({'sleeptime': 10})
        self.tried(self.put([A, B]), 1)

        self.advance_until(lambda: not self.spooled(), 600)

        self.assertEqual([[A], [B]], [m.to for m in self.upstream.mails])

    def test_what_needs_the_owner_is_an_error_once(self):
        for script in ({'MAIL': self.CLOSED}, {'RCPT': self.CLOSED}, {
                'EHLO': '550 5.7.1 Helo command rejected: need a name',
                'HELO': '550 5.7.1 Helo command rejected: need a name'}):
            with self.subTest(script):
                ids = self.limited(script, 2)
                connections = self.upstream.connections

                self.advance_until(lambda: (
                    self.upstream.connections > connections + 3), 1200)

                self.assertEqual(1, self.log().count(' ERROR '))
                self.assertNotLogged(' WARNING ')
                self.assertEqual(2, len(self.spooled()), ids)
                self.clear()
                os.unlink(self.path('smtpproxy.log'))

    def test_a_login_refused_is_not_tried_each_minute(self):
        self.upstream.script['AUTH'] = '535 5.7.8 Error: authentication failed'
        self.begin({'sleeptime': 10}, {SENDER: self.account(
            smtpusername='me', smtppassword='pw')})
        id = self.put()
        self.assertIn('app password', self.tried(id, 1).problem)
        before = self.upstream.connections

        self.advance(3500)
        wait_until(self.at_rest)

        self.assertEqual(before, self.upstream.connections)

    def test_deleteonerror_deletes_what_would_pass_by_itself(self):
        self.upstream.script['RCPT'] = self.LIMIT
        self.begin({'deleteonerror': 'true'})

        ids = [self.put() for _ in range(2)]

        self.assertGone()
        for id in ids:
            self.assertLogged('ERROR', id, 'deleted', 'smtprate')


class ForSome(RelayCase):
    """A server that sends to the outside only for those who log in: it says
    to others what it says to strangers, and takes mail for its own."""

    OUTSIDE, WHY = 'far@example.net', '530 5.7.0 Authentication required'

    def choosy(self, **config):
        self.upstream.script['RCPT TO:<' + self.OUTSIDE] = self.WHY
        self.begin(dict({'sleeptime': 10}, **config))

    def assertFlows(self, count=6):
        """A mail each ten minutes gets through at once."""
        for _ in range(count):
            before = len(self.upstream.mails)
            self.put()
            wait_until(lambda: len(self.upstream.mails) > before)
            self.advance(600)
            wait_until(self.at_rest)

    def test_who_is_refused_beside_others_holds_nobody_up(self):
        self.choosy()

        id = self.put([A, self.OUTSIDE])

        self.assertIn('smtpusername', self.tried(id, 1).problem)
        self.assertFlows()

    def test_who_is_refused_first_holds_others_up_for_an_hour_only(self):
        self.choosy()
        self.tried(self.put([self.OUTSIDE]), 1)
        self.put()

        self.advance_until(lambda: self.upstream.mails, 600)
        wait_until(self.at_rest)

        self.assertFlows()

    def test_mails_to_him_again_and_again_hold_nobody_up(self):
        self.choosy()
        self.put()
        wait_until(lambda: self.upstream.mails)

        for _ in range(6):
            self.tried(self.put([self.OUTSIDE]), 1)
            self.assertFlows(1)

    def test_his_mail_is_tried_for_retrydays_and_parked(self):
        self.choosy(retrydays=1)
        id = self.put([A, self.OUTSIDE])
        self.tried(id, 1)

        self.advance_until(lambda: self.spool.load(id).parked, 3600)

        self.assertEqual([self.OUTSIDE], self.spool.load(id).to)

    def test_one_that_takes_nobody_any_more_is_not_asked_for_each(self):
        self.begin({'sleeptime': 10})
        self.put()
        wait_until(lambda: self.upstream.mails)
        self.upstream.script['RCPT'] = self.WHY
        self.tried(self.put(), 1)
        self.advance(3700)
        wait_until(self.at_rest)
        before = len(self.verbs('MAIL'))

        for _ in range(20):
            self.put()
        self.advance(3000)
        wait_until(self.at_rest)

        self.assertLessEqual(len(self.verbs('MAIL')), before + 2)


class MoreConnections(RelayCase):

    def test_threads_that_begin_while_one_is_refused_are_counted(self):
        """Else the count is wrong for good, and nobody delivers any more."""
        destination = smtpproxy.Destination(smtpproxy.Account(
            smtphost='example.org', smtpconnections=4), self.clock, None, None)
        with mock.patch('threading.Thread.start') as start:
            for count in range(40):
                destination.add(str(count), self.clock() + 10)
            destination._threads, destination._gets_through = 3, True
            start.reset_mock()
            self.clock.advance(10)      # all are due at once

            self.assertEqual(2, destination.retire(destination.take()))

            self.assertEqual(2 + start.call_count, destination._threads)
            self.assertEqual(40, len(destination.due))

    def crowd(self, count, script=None, **keys):
        """So many mails to a server that takes the first one at once and the
        others when self.gate is set."""
        self.gate.clear()
        self.upstream = self.serve(FakeSMTP(
            dict({'.': [None, self.wait_at_gate]}, **script or {})))
        self.begin(accounts={SENDER: self.account(**keys)})
        for _ in range(count):
            self.put()

    def finish(self, count):
        """Lets them all through."""
        self.gate.set()
        self.upstream.wait(count)
        self.assertGone()
        self.assertEqual(count, len(self.upstream.mails))
        self.end()

    def test_only_while_a_backlog_lasts(self):
        for count, keys, expected in (
                (5, {}, 1), (60, {}, 4), (60, {'smtpconnections': 1}, 1),
                (60, {'smtpconnections': 2}, 2)):
            with self.subTest(count=count, keys=keys):
                self.crowd(count, **keys)
                wait_until(lambda: self.upstream.connections == expected)
                self.advance(0)

                self.finish(count)

                self.assertEqual(expected, self.upstream.connections)

    def test_an_extra_connection_refused_is_no_failure(self):
        for refusal in '421 4.7.0 too many', '554 5.7.0 too many':
            with self.subTest(refusal):
                self.crowd(60, {'': [None, refusal]})
                wait_until(lambda: self.upstream.connections > 1)

                self.finish(60)

                self.assertNotLogged('WARNING')
                self.assertNotLogged('ERROR')
                self.assertLess(self.upstream.connections, 8)


class Away(RelayCase):
    """A disk that is away for a moment: nothing is forgotten, nothing is
    sent twice."""

    def park(self):
        self.upstream.script['RCPT'] = NEVER
        self.begin({'sleeptime': 10})
        id = self.put()
        wait_until(lambda: self.spool.load(id).parked and self.at_rest())
        self.upstream.script.clear()
        return id

    @contextlib.contextmanager
    def away(self, instead=False):
        """msgs/ is elsewhere; instead: an empty folder is in its place."""
        os.rename(self.path('msgs'), self.path('away'))
        if instead:
            os.mkdir(self.path('msgs'))
        yield
        if instead:
            os.rmdir(self.path('msgs'))
        os.rename(self.path('away'), self.path('msgs'))

    @contextlib.contextmanager
    def unreadable(self):
        """No mail can be read: EIO."""
        def open_(path, *arguments, **options):
            if str(path).endswith('.mail'):
                raise OSError(errno.EIO, 'Input/output error', path)
            return real(path, *arguments, **options)
        real = open
        with mock.patch('builtins.open', open_):
            yield

    def test_a_reload_meanwhile_is_made_up_for(self):
        for instead in False, True:
            with self.subTest(instead=instead):
                count = len(self.upstream.mails)
                self.park()
                with self.away(instead):
                    self.reload()
                    self.assertLogged(self.path('msgs'), 'cannot be read')
                    self.advance(10)

                self.advance_until(lambda: self.upstream.mails[count:], 10)

                self.assertGone()
                self.clear()
                self.write('smtpproxy.log', '')

    def test_a_parked_mail_that_cannot_be_read_is_tried_later(self):
        for ask in self.reload, lambda: self.spool.ask('all', 'retry'):
            with self.subTest(ask):
                count = len(self.upstream.mails)
                id = self.park()
                with self.unreadable():
                    ask()
                    self.advance(10)
                    self.assertLogged(id, 'cannot be read')

                self.advance_until(lambda: self.upstream.mails[count:], 10)

                self.assertGone()
                self.assertEqual(count + 1, len(self.upstream.mails))
                self.clear()

    def test_a_mail_that_cannot_be_read_at_a_reload_is_in_one_place(self):
        self.upstream.script['RCPT'] = [LATER, None]
        self.begin({'sleeptime': 10})
        id = self.put()
        self.tried(id, 1)
        with self.unreadable():
            for _ in range(3):
                self.reload()
                self.advance(10)
                self.assertLessEqual(sum(
                    id in queue for queue in self.relay.queues), 1)

        self.advance_until(lambda: self.upstream.mails, 10)
        self.advance(3600)

        self.assertGone()
        self.assertEqual(1, len(self.upstream.mails))

    def test_what_was_delivered_meanwhile_is_not_sent_again(self):
        self.upstream.script['.'] = self.wait_at_gate
        self.begin({'sleeptime': 10})
        id = self.put()
        wait_until(lambda: self.verbs('DATA'))
        with self.away():
            self.gate.set()
            self.assertLogged('ERROR', id, 'cannot be removed')
            self.advance(10)
        self.reload()

        self.advance_until(lambda: not self.spooled(), 10)

        self.assertEqual(1, len(self.upstream.mails))


    def test_no_mail_is_promised_in_another_folder(self):
        """The mount point of a disk that is away."""
        self.begin({'sleeptime': 10})
        with self.away(instead=True):
            with self.assertRaises(OSError) as caught:
                self.put()
            self.assertEqual([], os.listdir(self.path('msgs')))

        self.assertIn('it is away', str(caught.exception))
        self.put([B])
        self.assertDelivered([B])

    def test_msgs_is_not_made_anew(self):
        """What is told to the owner, and asked for, is to be kept then."""
        self.begin({'sleeptime': 10, 'alert': OTHER, 'alertfrom': SENDER})
        with self.away():
            self.relay.alerts.tell('something needs you')
            self.assertLogged('ERROR', 'cannot be stored')
            for step in (lambda: self.spool.keep_note('alerts', ''),
                         lambda: self.spool.ask('all', 'retry')):
                self.assertRaises(OSError, step)

            self.assertFalse(os.path.exists(self.path('msgs')))

    def test_what_could_not_be_stored_nor_removed_is_not_sent(self):
        def fails(*_, **__):
            raise OSError(errno.EIO, 'Input/output error')
        self.begin({'sleeptime': 10})
        for call in 'os.fsync', 'os.write':     # all of it is there, a part
            with self.subTest(call):
                draft = self.spool.draft(SENDER, [B], {})
                draft.write(MAIL)
                with mock.patch(call, fails), mock.patch('os.unlink', fails):
                    with self.assertRaises(OSError):
                        draft.seal()
                        draft.commit()
                    draft.abort()
                    draft.release()

                self.reload()
                self.advance_until(lambda: not self.spooled(), 10)

        self.assertEqual([], self.upstream.mails)
        self.assertNotLogged('ERROR')


class Misfortune(RelayCase):

    def test_a_delivered_mail_that_stays_on_disk_is_not_sent_again(self):
        def unlink(path, *arguments, **options):
            if str(path).endswith('.mail'):
                raise PermissionError(13, 'Read-only', path)
            real(path, *arguments, **options)
        real = os.unlink
        self.begin({'sleeptime': 10})
        with mock.patch('os.unlink', unlink):
            id = self.put()
            self.assertDelivered([A])
            self.assertLogged('ERROR', id, 'cannot be removed', 'not be sent '
                              'again')
            self.reload()
            for _ in range(3):
                self.advance(3600)
            self.put([B])
            self.assertDelivered([B], 2)
        self.advance_until(lambda: not self.spooled(), 11)
        self.assertEqual(2, len(self.upstream.mails))

    def test_tries_count_though_the_disk_is_full(self):
        def open_(path, flags, *arguments, **options):
            if flags & os.O_APPEND and path.endswith('.mail'):
                raise OSError(28, 'No space left on device', path)
            return real(path, flags, *arguments, **options)
        real, self.upstream.script['RCPT TO:<b@'] = os.open, LATER
        self.begin({'sleeptime': 10})
        with mock.patch('os.open', open_):
            id = self.put([A, B])
            self.assertLogged('ERROR', id, 'No space left')
            for tries in 2, 3:
                self.tried(id, tries - 1)
                self.advance_until(lambda: len(self.verbs(
                    'RCPT TO:<b@')) >= tries, 5)
            self.tried(id, 3)

        self.assertEqual(1, len(self.upstream.mails), 'A has it already')
        self.assertEqual([A], self.upstream.mails[0].to)

    def test_an_account_that_goes_during_a_delivery_costs_no_second_copy(self):
        """The ini is reloaded without it before the server's reply."""
        self.upstream.script['.'] = self.wait_at_gate
        self.begin()
        id = self.put()
        wait_until(lambda: self.verbs('DATA'))
        self.reload(smtpproxy.load(self.ini(accounts={
            OTHER: self.account()})))
        self.advance(0)

        self.gate.set()

        self.assertDelivered([A])
        self.assertLogged('INFO', id, 'sent to <%s>' % A)
        self.assertGone()

    def test_a_reload_before_a_delivered_mail_is_removed_sends_no_copy(self):
        def unlink(path, *arguments, **options):
            if str(path).endswith('.mail'):
                reached.set()
                self.gate.wait(5)
            real(path, *arguments, **options)
        reached, real = threading.Event(), os.unlink
        self.begin()
        with mock.patch('os.unlink', unlink):
            self.put()
            self.assertTrue(reached.wait(5))
            self.reload(smtpproxy.load(self.ini(accounts={
                SENDER: self.account(localhostname='new.home.lan')})))
            self.advance(0)
            self.put([B])
            self.upstream.wait(2)
            self.gate.set()
            self.assertGone()

        self.assertEqual([[A], [B]], [m.to for m in self.upstream.mails])

    def test_a_changed_account_is_used_at_once(self):
        self.upstream.script['AUTH'] = '535 5.7.8 wrong'
        login = {'smtpusername': 'me', 'smtppassword': 'old'}
        self.begin(accounts={SENDER: self.account(**login)})
        id = self.put()
        self.tried(id, 1)

        self.reload(smtpproxy.load(self.ini(accounts={
            SENDER: self.account()})))

        self.assertDelivered([A])
        self.assertGone()

    def test_mail_that_somebody_removed_is_forgotten(self):
        self.upstream.script['RCPT'] = LATER
        self.begin({'sleeptime': 1})
        id = self.put()
        self.tried(id, 1)
        os.unlink(self.path('msgs', id + '.mail'))

        self.advance(3)

        self.put([B])
        wait_until(lambda: len(self.verbs('RCPT')) == 2)

    def test_threads_end_when_there_is_nothing_to_do(self):
        with mock.patch.object(smtpproxy, 'LINGER', .01):
            self.begin()
            self.put()
            self.assertDelivered([A])

            wait_until(lambda: not [t for t in threading.enumerate()
                                    if t.name.startswith('relay-')])
            wait_until(lambda: not self.upstream.open)

    def test_mail_found_at_start_is_delivered(self):
        self.begin()
        self.relay.announce = lambda *_: None       # as if it had crashed
        self.put()
        self.end()

        self.begin()

        self.assertDelivered([A])
        self.assertGone()

    def test_stop_takes_no_longer_than_the_delivery_that_fails(self):
        self.upstream.script[''] = lambda talk: (
            self.wait_at_gate(talk) or '421 4.3.2 busy')
        self.begin()
        id, relay = self.put(), self.relay
        wait_until(lambda: self.upstream.connections)
        stopper = threading.Thread(target=self.end, name='stopper')
        stopper.start()
        wait_until(lambda: relay.queues.unrouted.closed)
        start = time.monotonic()

        self.gate.set()
        stopper.join()

        self.assertLess(time.monotonic() - start, 2)
        self.assertNotLogged('stopped during a delivery')
        self.assertLogged('WARNING', id, '421 4.3.2 busy')
        self.assertSpooled(1)

    def test_no_thread_goes_on_after_a_stop(self):
        self.upstream.script['.'] = lambda talk: self.wait_at_gate(talk)
        self.begin()
        for _ in range(5):
            self.put()
        wait_until(lambda: self.verbs('DATA'))
        stopper = threading.Thread(target=self.end, name='stopper')
        stopper.start()
        wait_until(lambda: not self.relay)

        self.gate.set()

        stopper.join()
        wait_until(lambda: not any(thread.name.startswith('relay-')
                                   for thread in threading.enumerate()))

    def test_stop_ends_a_lingering_connection_at_once(self):
        self.begin()
        self.put()
        self.assertDelivered([A])
        self.assertGone()
        start = time.monotonic()

        self.end()

        self.assertLess(time.monotonic() - start, 1)
        wait_until(lambda: self.verbs('QUIT'))


if __name__ == '__main__':
    unittest.main()
