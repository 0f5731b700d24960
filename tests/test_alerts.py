"""Alerts: what needs a person reaches one, by mail and not too often."""
import email
import errno
import os
import ssl
import time
import unittest
from unittest import mock

import smtpproxy
from tests.case import A, OTHER, SENDER, ProxyCase
from tests.fakes import CERTIFICATE, FakePOP, FakeSMTP, wait_until
from tests.test_relay import LATER, MAIL, NEVER, RelayCase

OWNER, BOX = 'owner@example.org', 'box@home.lan'
HOUR, DAY = 3600, 86400


def lines_of(mail):
    """What an alert tells, a line for each thing."""
    text = email.message_from_bytes(mail.data).get_payload(decode=True)
    return [line[2:] for line in text.decode().splitlines()
            if line.startswith('- ')]


class AlertCase(RelayCase):
    """SENDER's account is self.upstream; the alerts go to self.post."""

    def setUp(self):
        super().setUp()
        self.post = self.serve(FakeSMTP(clock=self.clock))

    def watched(self, script=None, account=(), **config):
        """Starts a relay whose owner wants to know."""
        self.upstream.script = script or {}
        self.begin(dict({'sleeptime': 10, 'alert': OWNER, 'alertfrom': BOX},
                        **config),
                   {SENDER: self.account(**dict(account)),
                    BOX: self.account(self.post)})

    def alerts(self, count=1):
        """The lines of so many alerts: [[line]]."""
        mails = self.post.wait(count)
        if self.relay:
            wait_until(lambda: not self.in_hand())
        return [lines_of(mail) for mail in mails]

    def parked(self):
        """A mail that was refused for good; returns its id."""
        id = self.put()
        wait_until(lambda: self.spool.load(id).parked and self.at_rest())
        return id

    def pass_an_hour(self):
        self.advance(HOUR)
        wait_until(self.at_rest)


class Mails(AlertCase):

    def test_a_parked_mail_is_told_at_once(self):
        self.watched({'RCPT': NEVER})

        id = self.parked()

        (line,), = self.alerts()
        for word in id, SENDER, A, 'the report', NEVER, 'advice: ':
            self.assertIn(word, line)

    def test_a_deleted_one_too(self):
        self.watched({'RCPT': LATER}, deleteonerror='true')

        id = self.put()

        (line,), = self.alerts()
        self.assertIn(id + ': deleted', line)

    def test_it_is_a_mail_that_no_program_answers(self):
        self.watched({'RCPT': NEVER}, alert='owner@example.org, b@x.org')
        self.parked()

        mail, = self.post.wait(1)

        head = email.message_from_bytes(mail.data)
        self.assertEqual((BOX, [OWNER, 'b@x.org']), (mail.sender, mail.to))
        self.assertEqual('auto-generated', head['Auto-Submitted'])
        self.assertEqual('owner@example.org, b@x.org', head['To'])
        self.assertIn('<%s>' % BOX, head['From'])
        self.assertTrue(head['Date'] and head['Message-ID'])

    def test_what_follows_is_collected_for_an_hour(self):
        self.watched({'RCPT': NEVER})
        self.parked()
        self.alerts()
        ids = [self.parked() for _ in range(3)]
        self.advance(HOUR - 20)
        self.assertEqual(1, len(self.post.mails))

        self.advance_until(lambda: len(self.post.mails) > 1, 10)

        self.assertEqual(ids, [line[:14] for line in self.alerts(2)[1]])

    def test_thousands_make_one_alert_of_a_hundred_lines(self):
        self.watched()
        for number in range(10000):
            self.relay.alerts.tell('mail %d is parked' % number)
        self.alerts()
        self.relay.alerts.tell('the last')

        self.pass_an_hour()
        self.pass_an_hour()

        told = sum(self.alerts(2), [])
        left_out = [int(line.split()[1]) for line in told
                    if line.startswith('and ')]
        self.assertEqual(10001, len(told) - len(left_out) + sum(left_out))
        self.assertLess(max(mail.data.partition(b'\r\n\r\n')[2].count(
            b'\n') for mail in self.post.mails), 101)
        self.assertEqual(2, len(self.post.mails))

    def test_a_thousand_refused_devices_hide_no_account(self):
        self.watched({'MAIL': '550 5.1.8 Access denied, bad outbound sender'})
        self.refuse_devices(1001)
        self.tried(self.put(), 1)

        for _ in range(3):              # each with a try of the account
            self.pass_an_hour()

        told = [line for line in sum(self.alerts(2), []) if 'act' in line]
        self.assertEqual(1, len(told), told)

    def test_the_newest_of_many_devices_is_told_once(self):
        self.watched()
        self.refuse_devices(1500)
        self.pass_an_hour()
        self.alerts(2)
        for _ in range(3):
            self.relay.alerts.tell('the last', 'sender last@home.lan')

        self.pass_an_hour()

        self.assertEqual(1, len(self.alerts(3)[2]))

    def refuse_devices(self, count):
        """So many clients' mail, within the hour after an alert."""
        self.relay.alerts.tell('the first')
        self.alerts()
        for number in range(count):
            self.relay.alerts.tell('device %d was refused' % number,
                                   'sender device%d@home.lan' % number)

    def refuse(self, sender):
        """A client tries to send as this one."""
        with self.assertRaises(smtpproxy.smtps.Refused):
            smtpproxy.Admission(
                self.settings, False, self.relay.alerts.tell).admit(
                    'client', sender)

    def test_a_reload_with_alert_tells_of_devices_refused_before(self):
        accounts = {SENDER: self.account(), BOX: self.account(self.post)}
        self.begin({'sleeptime': 10}, accounts)
        self.refuse('camera@home.lan')

        self.reload(smtpproxy.load(self.ini({
            'sleeptime': 10, 'alert': OWNER, 'alertfrom': BOX}, accounts)))
        for _ in range(3):
            self.refuse('camera@home.lan')

        self.assertIn('camera@home.lan', self.alerts()[0][0])

    def test_what_a_server_says_is_printable_there(self):
        self.watched()
        self.relay.alerts.tell('evil \x1b[2J\r\n.\r\nMAIL b\xfcro ' + 'x' * 2000)

        (line,), = self.alerts()

        self.assertIn(r'evil \x1b[2J\r\n.\r\nMAIL büro xxx', line)
        self.assertLess(max(map(len, self.post.mails[0].data.split(
            b'\r\n'))), 998)

    def test_a_long_line_says_who_and_what_to_do(self):
        self.watched({'RCPT TO:<%s' % name: (
            '550 5.1.1 The email account that you tried to reach does not '
            'exist. Please try double-checking the address for typos or '
            'unnecessary spaces. For more information, go to '
            'https://support.google.com/mail/?p=NoSuchUser %s' % (name * 60))
            for name in 'abc'})

        id = self.put([name * 30 + '@example.org' for name in 'abc'])

        (line,), = self.alerts()
        for word in (id, '550 5.1.1 The', 'advice: ', 'from <%s>' % SENDER,
                     '<%s@' % ('c' * 30), 'the report', '--retry ' + id):
            self.assertIn(word, line)
        self.assertLess(max(map(len, self.post.mails[0].data.split(
            b'\r\n'))), 998)

    def test_a_reload_without_alert_ends_it(self):
        self.watched({'RCPT': NEVER})
        self.parked()
        self.alerts()
        self.parked()

        self.reload(smtpproxy.load(self.ini({'sleeptime': 10}, {
            SENDER: self.account()})))
        self.pass_an_hour()
        self.pass_an_hour()

        self.assertEqual(1, len(self.post.mails))

    def test_without_alert_nothing_is_told(self):
        self.watched({'RCPT': NEVER}, alert='')

        self.parked()
        self.pass_an_hour()

        self.assertEqual([], self.post.mails)
        self.assertFalse(os.path.exists(self.path('msgs', 'alerts')))


class Accounts(AlertCase):

    def test_an_account_that_cannot_be_used_for_an_hour_is_told_once(self):
        self.watched({'': '421 4.3.2 busy'})
        self.tried(self.put(), 1)
        self.advance_until(lambda: self.post.mails, 200)

        for _ in range(5):
            self.pass_an_hour()

        (line,), = self.alerts()
        self.assertIn(':%d could not be used for an hour, ' %
                      self.upstream.port, line)
        self.assertIn('421 4.3.2 busy', line)
        self.assertEqual(1, len(self.post.mails))

    def test_that_it_works_again_is_told(self):
        self.watched({'': '421 4.3.2 busy'})
        self.tried(self.put(), 1)
        self.advance_until(lambda: self.post.mails, 200)
        self.upstream.script.clear()

        self.advance_until(lambda: len(self.post.mails) > 1, 600)

        self.assertIn('works again', self.alerts(2)[1][0])

    def test_that_is_not_told_before_it_has_taken_a_mail(self):
        self.watched({'MAIL': ['550 5.1.8 Access denied, bad outbound sender',
                               LATER]})
        self.tried(self.put(), 1)
        self.alerts()
        self.advance_until(lambda: len(self.verbs('MAIL')) > 2, 600)
        self.pass_an_hour()
        self.assertEqual(1, len(self.post.mails))
        self.upstream.script.clear()

        self.advance_until(lambda: self.upstream.mails, 600)
        self.pass_an_hour()

        self.assertIn('works again', self.alerts(2)[1][0])

    def test_nor_by_a_mail_that_was_under_way_before(self):
        self.watched({'.': lambda talk: self.wait_at_gate(talk), 'MAIL': [
            None, '550 5.1.8 Access denied, bad outbound sender']})
        self.put()
        wait_until(lambda: self.verbs('DATA'))
        destination = self.relay.queues.destination(
            self.settings.account_for(SENDER))
        with destination.changed:       # as a second mail has shown before
            destination._gets_through = True
        for _ in range(12):
            self.put()
        self.post.wait(1)

        self.gate.set()
        wait_until(lambda: self.upstream.mails and self.at_rest())
        self.relay.alerts.tell('the end')
        self.pass_an_hour()

        self.assertEqual(['the end'], self.alerts(2)[1])

    def test_a_stranger_to_a_server_that_takes_us_is_told_once(self):
        """It relays for some only. The alerts go by the same account."""
        self.upstream.script['RCPT TO:<%s' % A] = '530 5.7.0 who are you?'
        self.begin({'sleeptime': 10, 'alert': OWNER, 'alertfrom': SENDER},
                   {SENDER: self.account()})

        self.put()
        for _ in range(20):
            self.pass_an_hour()
            wait_until(self.at_rest)

        self.assertLessEqual(len(self.upstream.mails), 2)

    def test_an_account_that_is_to_be_recalled_is_not_told(self):
        self.watched({'': '421 4.3.2 busy'})
        self.tried(self.put(), 1)
        watch = smtpproxy.Watch(self.spool, self.relay.alerts)
        others = smtpproxy.load(self.ini(accounts={
            BOX: self.account(self.post)}))

        with mock.patch.object(self.relay.alerts, 'tell') as tell:
            self.clock.advance(2 * HOUR)
            watch.look_round(others, (), [self.relay.queues.destination(
                self.settings.account_for(SENDER))])

        tell.assert_not_called()

    def test_accounts_at_one_server_are_told_apart(self):
        """POP before SMTP: nothing but the POP login is theirs alone."""
        bad = self.serve(FakePOP({'PASS': '-ERR [AUTH] wrong'}))
        self.begin({'sleeptime': 10, 'alert': OWNER, 'alertfrom': BOX}, {
            SENDER: self.by_pop(bad), OTHER: self.by_pop(self.serve(
                FakePOP())), BOX: self.account(self.post)})
        self.tried(self.put(), 1)
        for count in range(1, 4):
            self.put(sender=OTHER)
            self.advance_until(lambda: len(self.upstream.mails) == count, 1)
            self.pass_an_hour()

        (line,), = self.alerts()

        self.assertIn('[%s]' % SENDER, line)
        self.assertEqual(1, len(self.post.mails))

    def by_pop(self, server):
        return self.account(
            popbeforesmtp='true', pophost=server.host, popport=server.port,
            popssl='false', popusername='me', poppassword='secret')

    def test_trouble_that_no_mail_waits_for_is_not_told(self):
        self.watched({'': ['421 4.3.2 busy', None]})
        id = self.put()
        self.tried(id, 1)
        self.spool.ask(id, 'delete')
        self.relay.wake()
        self.assertSpooled(0)
        for _ in range(8):
            self.advance(600)
        self.put()
        wait_until(lambda: self.upstream.mails)
        self.relay.alerts.tell('the end')

        self.assertEqual([['the end']], self.alerts())

    def test_short_trouble_is_not_told(self):
        self.watched({'': ['421 4.3.2 busy', None]})
        self.tried(self.put(), 1)

        self.advance_until(lambda: self.upstream.mails, 10)
        self.pass_an_hour()
        self.pass_an_hour()

        self.assertEqual([], self.post.mails)

    def test_what_needs_the_owner_is_told_at_once(self):
        self.watched({'MAIL': '550 5.1.8 Access denied, bad outbound sender'})

        self.tried(self.put(), 1)

        (line,), = self.alerts()
        self.assertIn('no mail passes before you act', line)

    def test_so_is_a_long_backlog_once(self):
        self.watched(account={'smtprate': 1})
        for _ in range(63):
            self.put()

        self.advance(10)
        for _ in range(3):
            self.pass_an_hour()

        (line,), = self.alerts()
        self.assertRegex(line, '6[123] mails wait for their turn')


class DiskTrouble(AlertCase):
    """What the disk refuses is told."""

    FULL = OSError(errno.ENOSPC, 'No space left on device')

    def watched(self, *arguments, **config):
        super().watched(*arguments, **config)
        self.spool.alert = self.relay.alerts.tell       # as Proxy does

    def test_a_state_that_cannot_be_saved(self):
        self.watched({'RCPT': LATER})
        with mock.patch.object(smtpproxy.Spool, '_append',
                               side_effect=self.FULL):
            id = self.put()
            (line,), = self.alerts()
            for _ in range(3):          # and mail can be stored meanwhile
                self.put(sender=BOX)
                self.pass_an_hour()
            self.post.wait(4)

        self.assertIn(id + ': its state cannot be saved', line)
        self.assertEqual(1, sum(mail.to == [OWNER]
                                for mail in self.post.mails))

    def test_what_handlers_made_of_a_mail_and_cannot_be_stored(self):
        accounts = {SENDER: self.account(), BOX: self.account(self.post)}
        self.watched()
        self.reload(smtpproxy.load(self.ini(
            {'sleeptime': 10, 'alert': OWNER, 'alertfrom': BOX}, accounts,
            '[handler rewriteaddress]\nenabled=true\nto *=%s\n' % OTHER)))
        with mock.patch.object(smtpproxy.Spool, 'replace',
                               side_effect=self.FULL):
            id = self.put()
            (line,), = self.alerts()

        self.assertIn(id + ': handlers cannot be run on it', line)

    def test_what_cannot_be_read_nor_set_aside(self):
        self.watched()
        with mock.patch.object(smtpproxy.os, 'rename',
                               side_effect=self.FULL):
            self.spool.set_aside('strange', 'it is no mail')
            self.spool.set_aside('strange', 'it is no mail')

        (line,), = self.alerts()

        self.assertIn('nor set aside: ', line)


class OverRestarts(AlertCase):

    def restart(self, **config):
        self.end()
        self.watched(self.upstream.script, **config)

    def test_what_was_collected_goes_out_at_a_stop(self):
        self.watched({'RCPT': NEVER})
        self.parked()
        self.alerts()
        id = self.parked()

        self.end()

        self.assertEqual(id, self.alerts(2)[1][0][:14])

    def test_the_hour_goes_on(self):
        self.watched({'RCPT': NEVER})
        self.parked()
        self.alerts()
        self.restart()
        self.parked()
        self.advance(HOUR - 100)
        self.assertEqual(1, len(self.post.mails))

        self.advance_until(lambda: len(self.post.mails) > 1, 10)

    def test_it_does_so_when_the_spools_time_is_set_back(self):
        """To that of the newest mail, which is an old one."""
        self.watched({'RCPT TO:<b@': LATER}, retrydays=9)
        self.put(['b@example.org'])
        for _ in range(5):
            self.pass_an_hour()
        for count in range(1, 4):       # a crash loop
            self.relay.alerts.tell('crash %d' % count)
            self.alerts()
            self.pull_the_plug()
            self.restart(retrydays=9)
        self.advance(HOUR - 100)
        wait_until(self.at_rest)
        self.assertEqual(1, len(self.post.mails))

        self.advance_until(lambda: len(self.post.mails) > 1, 10)

        self.assertEqual(['crash 2', 'crash 3'], self.alerts(2)[1])

    def test_a_power_cut_loses_nothing_that_was_collected(self):
        self.watched({'RCPT': NEVER})
        self.parked()
        self.alerts()
        id = self.parked()
        self.advance(10)
        wait_until(lambda: id in self.spool.note('alerts'))

        self.pull_the_plug()
        self.restart()
        self.pass_an_hour()

        self.assertEqual([id], [line[:14] for line in self.alerts(2)[1]])

    def pull_the_plug(self):
        """What was to be done at a stop is not."""
        self.relay.wake()
        wait_until(lambda: self.relay._last_round > 0)
        relay, self.relay = self.relay, None
        relay.queues.close()
        relay._thread.join(5)
        self.spool.close()

    def test_what_the_owner_knows_is_not_told_again(self):
        script = {'MAIL': '550 5.1.8 Access denied, bad outbound sender'}
        self.watched(script)
        id = self.put()
        self.tried(id, 1)
        self.alerts()

        self.restart()
        self.tried(id, 2)
        self.pass_an_hour()
        self.pass_an_hour()
        self.assertEqual(1, len(self.post.mails))
        self.upstream.script.clear()

        self.advance_until(lambda: len(self.post.mails) > 1, 600)
        self.assertIn('works again', self.alerts(2)[1][0])

    def test_an_alert_that_waits_is_known_and_goes_first(self):
        self.watched({'RCPT': NEVER})
        self.post.script[''] = '421 4.3.2 busy'
        normal = [self.put(sender=BOX) for _ in range(3)]
        self.tried(normal[0], 1)
        self.parked()
        wait_until(lambda: len(self.spooled()) == 5)
        self.post.script.clear()

        self.restart(retrydays=9)

        self.assertEqual([OWNER], self.post.wait(4)[0].to)

    def test_a_damaged_note_stops_nothing(self):
        for damage in (b'', b'{', b'[]', b'{"told": 7, "last": "x"}',
                       b'{"told": [], "last": 0, "ids": [], "mark": ""}'):
            with self.subTest(damage):
                self.write('msgs/alerts/note', damage)
                self.watched({'RCPT': NEVER})
                count = len(self.post.mails) + 1

                self.parked()

                self.alerts(count)
                self.clear()


    def test_two_threads_write_one_note_after_the_other(self):
        self.watched()
        alerts, at_once = self.relay.alerts, []

        def keep_note(name, text):
            at_once.append(alerts._writing.locked())
        with mock.patch.object(self.spool, 'keep_note', keep_note):
            alerts.tell('the news', 'this')
            alerts._remember()

        self.assertEqual([True], at_once[:1])


class NoLoops(AlertCase):
    """Trouble with an alert makes no alert."""

    def test_one_that_is_refused_is_kept_and_makes_no_other(self):
        for deleteonerror in 'true', 'false':
            with self.subTest(deleteonerror=deleteonerror):
                self.post.script['RCPT'] = NEVER
                self.watched({'RCPT': NEVER}, deleteonerror=deleteonerror)
                self.put()
                wait_until(lambda: any(
                    mail.parked and mail.is_alert
                    for mail in smtpproxy.mails(
                self.spool, smtpproxy.waiting(self.spool))))

                for _ in range(3):
                    self.pass_an_hour()

                self.assertEqual(1, sum(mail.is_alert for mail in
                                        smtpproxy.mails(
                self.spool, smtpproxy.waiting(self.spool))))
                self.clear()

    def test_deleteonerror_keeps_one_that_has_to_wait(self):
        self.post.script[''] = ['421 4.3.2 busy', None]
        self.watched({'RCPT': NEVER}, deleteonerror='true')
        self.put()
        wait_until(lambda: self.post.connections and self.at_rest())

        self.advance_until(lambda: self.post.mails, 10)

        self.alerts()
        self.assertGone()

    def test_one_that_comes_back_makes_no_other(self):
        """The account of alertfrom leads to this very proxy, or its server
        sends a notice that nobody has got it; a restart changes nothing."""
        notice = b'Subject: Undelivered\r\n\r\nYou have sent this:\r\n\r\n'
        self.upstream.script['RCPT'] = NEVER
        for sender, before, restart in ((OTHER, b'', False), (
                '', notice, False), (BOX, b'', True)):
            with self.subTest(sender):
                count = len(self.post.mails)
                self.begin_for_all()
                self.relay.alerts.tell('something')
                self.alerts(count + 1)
                if restart:
                    self.end()
                    self.begin_for_all()
                self.post.script['RCPT'] = [NEVER, None]

                id = self.put([OWNER], sender, before
                              + self.post.mails[count].data)
                wait_until(lambda: self.spool.load(id).parked)
                self.post.script.clear()
                self.relay.alerts.tell('the end')
                self.pass_an_hour()

                self.assertEqual(['the end'], self.alerts(count + 2)[-1])
                self.clear()

    def begin_for_all(self):
        self.begin({'sleeptime': 10, 'alert': OWNER, 'alertfrom': BOX}, {
            'default': self.account(), BOX: self.account(self.post)})

    def test_mail_of_a_program_from_alertfrom_is_told(self):
        self.watched()
        self.post.script['RCPT TO:<' + A] = NEVER

        id = self.put(sender=BOX, content=(
            b'Auto-Submitted: auto-generated\r\n' + MAIL))

        self.assertIn(id, self.alerts()[0][0])

    def test_a_broken_account_of_alertfrom_is_told_when_it_works(self):
        self.watched()
        self.post.script[''] = '421 4.3.2 busy'
        self.tried(self.put(sender=BOX), 1)
        for _ in range(4):
            self.pass_an_hour()
        self.assertLess(len(self.spooled()), 4)
        self.post.script.clear()

        self.advance_until(lambda: len(self.post.mails) > 2, 1200)

        told = [line for mail in self.post.mails if mail.to == [OWNER]
                for line in lines_of(mail)]
        self.assertIn('could not be used', told[0])
        self.assertIn('works again', told[-1])

    def test_one_whose_recipient_is_refused_holds_up_no_other_mail(self):
        """The server takes mail for its own users only, not for OWNER."""
        self.post.script['RCPT TO:<' + OWNER] = (
            '550 Relay access denied - please authenticate')
        self.watched()
        self.relay.alerts.tell('something')
        wait_until(lambda: self.verbs('RCPT', self.post) and self.at_rest())

        for count in range(1, 7):
            self.put(sender=BOX)
            self.post.wait(count)
            self.pass_an_hour()

        self.assertEqual(1, len(self.spooled()))

    def test_a_full_disk_keeps_what_is_to_be_told(self):
        self.watched({'RCPT': NEVER})
        with mock.patch.object(smtpproxy.Draft, 'commit',
                               side_effect=OSError(28, 'No space left')):
            self.relay.alerts.tell('first')
            self.assertLogged('ERROR', 'an alert to owner@example.org cannot '
                              'be stored', 'No space left')
            for _ in range(9):
                self.advance(60)
            self.relay.alerts.tell('second')

        self.advance_until(lambda: self.post.mails, 20)

        self.assertEqual([['first', 'second']], self.alerts())
        self.assertEqual(1, self.log().count('cannot be stored'))


class WholeProxy(ProxyCase):
    """What clients, the disk and the ini cause."""

    def setUp(self):
        super().setUp()
        self.post = self.serve(FakeSMTP())

    def watched(self, more='', **config):
        self.start(dict({'alert': OWNER, 'alertfrom': BOX}, **config), {
            SENDER: self.account(), BOX: self.account(self.post),
            OTHER: self.account(localpassword='right')}, more)

    def told(self, count=1):
        return [line for mail in self.post.wait(count)
                for line in lines_of(mail)]

    def test_a_device_with_an_unknown_sender_is_told_once(self):
        self.watched()
        client = self.greeted()
        for _ in range(3):
            client.command('MAIL FROM:<new-device@home.lan>')

        line, = self.told()

        self.assertIn('127.0.0.1', line)
        self.assertIn('no account for its sender <new-device@home.lan>', line)

    def test_so_is_one_with_a_wrong_password(self):
        self.watched()
        for _ in range(2):
            client = self.greeted()
            with mock.patch('smtps.AUTH_PAUSE', 0.01):
                client.command('AUTH PLAIN ' + smtpproxy.smtps.encoded64(
                    '\0%s\0wrong' % OTHER))

        line, = self.told()

        self.assertIn('wrong password for [%s]' % OTHER, line)
        self.assertNotIn(' wrong\0', line)

    def test_mail_that_cannot_be_stored_is_told_and_that_it_can_again(self):
        self.watched()
        real = smtpproxy.Draft.seal

        def seal(draft):
            if not mine:                # the alert can be stored
                mine.append(draft.id)
                raise OSError(28, 'No space left on device')
            real(draft)
        mine = []
        with mock.patch.object(smtpproxy.Draft, 'seal', seal):
            client = self.greeted()
            client.command('MAIL FROM:<%s>' % SENDER)
            client.command('RCPT TO:<%s>' % A)
            self.assertEqual(452, client.data(MAIL)[0])
        self.submit()
        self.post.wait(1)               # it may hold both
        self.stop()

        told = self.told(1)
        if len(told) < 2:
            told = self.told(2)
        self.assertIn('cannot be stored', ' '.join(told))
        self.assertIn('can be stored again', ' '.join(told))

    def test_what_is_set_aside_is_told(self):
        self.write('msgs/strange', b'what is this?')

        self.watched()

        self.assertIn('corrupt/strange', self.told()[0])

    def test_no_handler_sees_an_alert(self):
        self.watched('[handler discardsubject]\nenabled=true\n'
                     'contains=smtpproxy\n')
        self.greeted().command('MAIL FROM:<nobody-knows@home.lan>')
        self.proxy.alerts.tell('something')

        self.assertTrue(self.told())

    def test_no_client_makes_an_alert(self):
        self.watched(deleteonerror='true')
        self.upstream.script['RCPT'] = NEVER
        client = self.greeted()
        client.command('MAIL FROM:<%s> ENVID=%s' % (SENDER, smtpproxy.ALERT))
        client.command('RCPT TO:<%s>' % A)
        client.data(MAIL)

        self.assertIn('deleted', self.told()[0])

    def test_a_certificate_that_expires_soon_is_told(self):
        for days, count in (10, 1), (20, 0):
            with self.subTest(days):
                with mock.patch.object(smtpproxy, 'certificate_end',
                                       return_value=time.time() + days * DAY):
                    self.watched(tlscert=CERTIFICATE, tlskey=CERTIFICATE)
                    self.submit()
                    self.assertDelivered([A], 1 + (days > 10))
                    self.post.wait(1)
                    self.stop()

                told = [line for mail in self.post.mails
                        for line in lines_of(mail)]
                self.assertEqual(1, sum('expires on' in x for x in told))

    def test_when_a_certificate_expires(self):
        expected = ssl.cert_time_to_seconds(
            ssl._ssl._test_decode_cert(CERTIFICATE)['notAfter'])

        self.assertEqual(expected, smtpproxy.certificate_end(CERTIFICATE))
        with self.assertRaises(ValueError):
            smtpproxy.certificate_end(self.write('x.pem', 'nothing'))

    def test_alertfrom_needs_an_account(self):
        for config, word in (
                ({'alert': OWNER}, 'alertfrom is missing'),
                ({'alert': OWNER, 'alertfrom': 'x@y.z'}, 'no account for it'),
                ({'alert': 'nobody', 'alertfrom': BOX}, 'must be addresses'),
                ({'alert': OWNER, 'alertfrom': BOX + ' a@b'}, 'one address')):
            with self.subTest(config):
                with self.assertRaises(smtpproxy.ConfigError) as caught:
                    smtpproxy.load(self.ini(config, {BOX: self.account()}))

                self.assertIn(word, str(caught.exception))


if __name__ == '__main__':
    unittest.main()
