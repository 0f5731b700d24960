"""Where each mail is: the invariant of the relay, and that each arrives once,
whatever happens to the accounts and whatever the owner asks for."""
import collections
import contextlib
import random
import threading
import unittest

import smtpproxy
from tests.case import ProxyCase
from tests.fakes import DROP, FakeSMTP, wait_until

MAILS, ACCOUNTS, ILL = 1000, 5, 2
TROUBLE = ('421 4.3.2 busy', DROP, '554 5.3.2 closed')     # as the greeting
REFUSALS = ('451 4.3.0 later', '421 4.3.2 busy', DROP)     # of a command


def places_of(relay):
    """{id: number of places it is in}, at one moment."""
    with contextlib.ExitStack() as stack:
        for queue in relay.queues:
            stack.enter_context(queue.changed)
        return collections.Counter(
            id for queue in relay.queues
            for held in (queue.due, queue.in_hand) for id in held)


class OneHome(ProxyCase):

    def setUp(self):
        super().setUp()
        self.random = random.Random(20261127)
        self.servers = [self.serve(FakeSMTP()) for _ in range(ACCOUNTS)]
        self.failed, self.over = [], threading.Event()
        self.addCleanup(self.over.set)

    def accounts(self, name='box.home.lan'):
        return {'d%d@home.lan' % n: self.account(server, localhostname=name)
                for n, server in enumerate(self.servers)}

    def watch(self):
        """Looks again and again."""
        while not self.over.wait(.01):
            self.check()

    def check(self):
        twice = [pair for pair in places_of(self.proxy.relay).items()
                 if pair[1] > 1]
        self.failed += twice

    def fall_ill(self, server):
        verb = self.random.choice(('', '', 'MAIL', 'RCPT', 'DATA'))
        server.script = {verb: self.random.choice(
            TROUBLE if verb == '' else REFUSALS)}

    def ask(self, what):
        """As the queue commands do."""
        spool, id = self.proxy.spool, self.random.choice(self.ids)
        if what == 'all':
            spool.ask('all', 'retry')
            return
        if what == 'delete':
            self.deleted.add(id)
        spool.ask(id, what)

    def step(self, n):
        """One mail comes in, and now and then something else happens."""
        sender = 'd%d@home.lan' % self.random.randrange(ACCOUNTS)
        self.ids.append(self.submit(
            b'X-Number: %d\r\n\r\nhello\r\n' % n, sender,
            client=self.device))
        chance = self.random.random()
        if chance < .02:
            self.fall_ill(self.random.choice(self.servers[:ILL]))
        elif chance < .04:
            self.random.choice(self.servers[:ILL]).script = {}
        elif chance < .10:
            self.ask('retry' if chance < .07 else 'delete')
        elif chance < .105:
            self.ask('all')
        elif chance < .12:
            self.ini(accounts=self.accounts(self.random.choice(
                ('box.home.lan', 'new.home.lan'))))
            self.proxy.reload()
        self.check()

    def test_each_mail_is_in_one_place_and_arrives_once(self):
        self.ids, self.deleted = [], set()
        self.start(accounts=self.accounts())
        threading.Thread(target=self.watch, name='watch', daemon=True).start()
        self.device = self.greeted()

        for n in range(MAILS):
            self.step(n)
        for server in self.servers:
            server.script = {}
        self.proxy.spool.ask('all', 'retry')
        wait_until(lambda: not self.spooled(), 30)
        self.over.set()

        self.assertEqual([], self.failed)
        wait_until(lambda: not places_of(self.proxy.relay))
        self.assertArrivedOnce()

    def assertArrivedOnce(self):
        copies = collections.Counter(
            int(mail.data.partition(b'X-Number: ')[2].split()[0])
            for server in self.servers for mail in server.mails)
        self.assertEqual({}, {n: c for n, c in copies.items() if c > 1})
        missing = {self.ids[n] for n in range(MAILS) if not copies[n]}
        self.assertEqual(set(), missing - self.deleted)
        self.assertLess(len(self.deleted), MAILS // 10)


if __name__ == '__main__':
    unittest.main()
