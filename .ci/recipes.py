"""The recipes of README.md, typed as they stand there, as root:

    unshare --mount --net --pid --fork --kill-child --mount-proc \
        python3 .ci/recipes.py

Each test has an /etc, an /opt and a /run of its own. Port 25 is free, and
nothing outlives the run.
"""
import configparser
import os
import pathlib
import pwd
import re
import shlex
import shutil
import signal
import smtplib
import subprocess
import sys
import tempfile
import time
import unittest

TOP = pathlib.Path(__file__).resolve().parent.parent
README = (TOP / 'README.md').read_text()
HOME = pathlib.Path('/opt/smtpproxy')
RIGHTS = 'Who may read it, who may change it'
ENVIRONMENT = {'PATH': '/opt/bin:/usr/sbin:/usr/bin:/sbin:/bin',
               'HOME': '/root', 'LC_ALL': 'C.UTF-8'}
COMMAND = b'-m\0smtpproxy\0--config\0/opt/smtpproxy/smtpproxy.ini\0'
INI = """\
[config]
sleeptime=1
deleteonerror=false
%s
%s
size=2000
count=2
[printer@home.lan]
smtphost=127.0.0.1
smtpport=9
localpassword=secret
[camera@home.lan]
smtphost=127.0.0.1
smtpport=9
"""
PROCD = r"""
script=$1 action=$2
cd /
procd_open_instance() { :; }
procd_close_instance() { :; }
procd_set_param() {
    [ "$1" = command ] || return 0
    shift
    (exec "$@") </dev/null >/run/procd.out 2>&1 &
    echo $! >/run/procd.pid
}
procd_send_signal() { kill -s "$3" "$(cat /run/procd.pid)"; }
enable() { :; }
start() { start_service; }
reload() { reload_service; }
. "$script"
"$action"
"""


def blocks(title):
    """The texts of the code blocks below a heading of README.md."""
    section = README.split('### %s\n' % title)[1].split('\n## ')[0]
    section = section.split('\n### ')[0]
    return re.findall(r'(?ms)^```\w+\n(.*?)^```', section)


def wait_until(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError('in vain: %s' % condition)
        time.sleep(0.1)


class Box(unittest.TestCase):
    """A box on which somebody has unpacked the program."""

    user = 'smtpproxy'

    def setUp(self):
        etc = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, etc)
        self.sh('cp -a /etc/. ' + etc)
        for what, where in (('--bind ' + etc, '/etc'),
                            ('-t tmpfs none', '/opt'),
                            ('-t tmpfs none', '/run')):
            self.sh('mount %s %s' % (what, where))
            self.addCleanup(self.sh, 'umount -l ' + where)
        self.addCleanup(self.end_all)
        self.unpack()

    def unpack(self):
        HOME.mkdir()
        for name in ('smtpproxy.py', 'smtps.py', 'MailHandler.py',
                     'smtpproxy.init.d'):
            shutil.copy(TOP / name, HOME)
        shutil.copytree(TOP / 'handlers', HOME / 'handlers',
                        ignore=shutil.ignore_patterns('__pycache__'))
        for name in 'opkg', 'apk':      # what they install is there
            path = pathlib.Path('/opt/bin', name)
            path.parent.mkdir(exist_ok=True)
            path.write_text('#!/bin/sh\n')
            path.chmod(0o755)

    def write_ini(self, config='user=smtpproxy'):
        (HOME / 'smtpproxy.ini').write_text(
            INI % (config, blocks(RIGHTS)[2]))
        self.sh('chown -R 1000:1000 %s; chmod -R ug+w %s' % (HOME, HOME))

    def sh(self, text):
        """What the lines print, each of which succeeds."""
        done = subprocess.run(
            ['sh', '-e', '-c', text], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            universal_newlines=True, env=ENVIRONMENT)
        if done.returncode:
            raise AssertionError('%s\n%s\n%s' % (text, done.stdout, self.log()))
        return done.stdout

    def log(self):
        try:
            return (HOME / 'log/smtpproxy.log').read_text()
        except OSError:
            return ''

    @staticmethod
    def pids():
        """Of the services in this namespace."""
        return [int(path.parent.name)
                for path in pathlib.Path('/proc').glob('[0-9]*/cmdline')
                if path.read_bytes().endswith(COMMAND)]

    def end_all(self):
        for pid in self.pids():
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not self.pids())

    # What each recipe promises.

    def answer(self, sender):
        """The code that MAIL FROM gets."""
        try:
            with smtplib.SMTP('127.0.0.1', 25, timeout=5) as client:
                client.ehlo()
                if sender.startswith('printer'):
                    client.login('printer@home.lan', 'secret')
                return client.mail(sender)[0]
        except OSError:
            return 0

    def hand_in(self):
        with smtplib.SMTP('127.0.0.1', 25, timeout=5) as client:
            client.sendmail('camera@home.lan', ['a@b'], 'Subject: x\n\nx\n')

    def assertRecipe(self, reload):
        wait_until(lambda: self.answer('printer@home.lan') == 250)
        self.assertSafe()
        self.assertRotates()
        self.assertReloads(reload)
        for bad in 'others than root', 'others on this box', 'begin anew':
            self.assertNotIn(bad, self.log())

    def assertSafe(self):
        pid, = self.pids()
        user = pwd.getpwnam(self.user)
        status = pathlib.Path('/proc/%d/status' % pid).read_text()
        for key, number in (('Uid', user.pw_uid), ('Gid', user.pw_gid),
                            ('Groups', user.pw_gid)):
            found = re.search(key + r':\s+(.*)', status)[1].split()
            self.assertEqual({str(number)}, set(found), key)
        writable = self.sh(
            'setpriv --reuid %d --regid %d --init-groups find %s -writable '
            '-prune' % (user.pw_uid, user.pw_gid, HOME)).split()
        self.assertEqual(['log', 'msgs', 'tokens'], sorted(
            os.path.relpath(path, HOME) for path in writable))
        ini = (HOME / 'smtpproxy.ini').stat()
        self.assertEqual((0, user.pw_gid, 0o640), (
            ini.st_uid, ini.st_gid, ini.st_mode & 0o777))
        self.assertTrue(list(HOME.glob('__pycache__/smtpproxy.*.pyc')))

    def assertRotates(self):
        for _ in range(100):
            self.hand_in()
            if (HOME / 'log/smtpproxy.log.1').exists():
                return
        self.fail('no log/smtpproxy.log.1\n' + self.log())

    def assertReloads(self, command):
        with open(HOME / 'smtpproxy.ini', 'a') as file:
            file.write('[new@home.lan]\nsmtphost=127.0.0.1\n')
        self.assertEqual(550, self.answer('new@home.lan'))
        self.sh(command)
        wait_until(lambda: self.answer('new@home.lan') == 250)

    def check_as_root(self):
        told = self.sh('cd /; python3 %s/smtpproxy.py --config '
                       '%s/smtpproxy.ini --check' % (HOME, HOME))
        self.assertNotIn('warning', told)


class InitScript(Box):

    def setUp(self):
        super().setUp()
        self.rights = ''.join(blocks(RIGHTS)[:2])
        self.recipe = blocks(
            'Init scripts: Devuan, Debian without systemd, BusyBox init')[0]

    def start_by(self, shell):
        script = HOME / 'smtpproxy.init.d'
        script.write_text(script.read_text().replace(
            '#!/bin/sh\n', '#!%s\n' % shell, 1))
        self.write_ini()
        self.sh(self.rights)
        self.check_as_root()
        self.assertIn('running', self.sh(self.recipe))
        self.assertRecipe('service smtpproxy reload')
        self.sh('service smtpproxy stop')
        self.assertEqual([], self.pids())

    def test_under_dash(self):
        self.start_by(shutil.which('dash'))

    def test_under_busybox(self):
        self.start_by(shutil.which('busybox') + ' sh')

    def test_an_installation_of_before_is_told_and_loses_no_mail(self):
        user, rights = blocks(RIGHTS)[:2]
        self.write_ini()
        self.sh(user + 'cd %s; mkdir log; chown -R smtpproxy:smtpproxy .; '
                'chmod 700 .; chmod 600 smtpproxy.ini' % HOME)
        self.assertIn('others than root', self.sh(self.recipe))
        wait_until(lambda: self.answer('printer@home.lan') == 250)
        self.hand_in()
        self.assertIn('WARNING %s: others than root' % HOME, self.log())

        self.sh('service smtpproxy stop')
        os.unlink(HOME / 'log/smtpproxy.log')
        self.sh(rights + 'service smtpproxy start')

        wait_until(lambda: self.answer('printer@home.lan') == 250)
        self.assertIn('mails in %s/msgs: 1' % HOME, self.log())
        self.assertRecipe('service smtpproxy reload')


class Others(Box):

    SYSTEMD = 'Debian, Raspberry Pi OS and others with systemd'

    def test_systemd(self):
        self.write_ini('')
        self.sh(''.join(blocks(RIGHTS)[:2]))
        self.check_as_root()
        self.start_by_systemd()

    def test_systemd_hands_a_password_to_the_service(self):
        _, _, make, unit, key = blocks(self.SYSTEMD)
        self.write_ini('')
        with open(HOME / 'smtpproxy.ini', 'a') as ini:
            ini.write('smtpusername=me\n' + key)
        self.sh(''.join(blocks(RIGHTS)[:2]))
        self.sh(make.replace('(umask', 'echo secret | (umask'))
        id, path = re.search('LoadCredential=(.*):(.*)', unit).groups()
        self.assertEqual('600 root', self.sh(
            'stat -c "%a %U" ' + path).strip())
        self.assertIn('cannot be read', self.sh(
            'cd %s; python3 smtpproxy.py --check' % HOME))
        place = '/run/credentials/smtpproxy.service'     # what systemd does
        self.sh('mkdir -p %s; install -m 400 -o smtpproxy %s %s/%s' % (
            place, path, place, id))
        self.start_by_systemd()

    def start_by_systemd(self):
        unit = configparser.ConfigParser(interpolation=None)
        unit.read_string(blocks(self.SYSTEMD)[0])
        unit = unit['Service']
        right = '+' + unit['AmbientCapabilities'][len('CAP_'):].lower()
        service = subprocess.Popen(
            ['setpriv', '--reuid', unit['User'], '--regid', unit['User'],
             '--init-groups', '--no-new-privs', '--inh-caps', right,
             '--ambient-caps', right, '--bounding-set', '-all,' + right,
             *shlex.split(unit['ExecStart'])], env=ENVIRONMENT,
            cwd=unit['WorkingDirectory'])
        self.assertRecipe('MAINPID=%d; %s' % (
            service.pid, unit['ExecReload']))
        service.terminate()
        self.assertEqual(0, service.wait(15))

    def test_openwrt(self):
        install, script, start, user = blocks('OpenWrt')
        pathlib.Path('/etc/rc.common').write_text('#!/bin/sh' + PROCD)
        os.chmod('/etc/rc.common', 0o755)
        pathlib.Path('/etc/init.d/smtpproxy').write_text(script)
        self.write_ini()
        self.sh(install + user + blocks(RIGHTS)[1] + start)
        self.assertRecipe('/etc/init.d/smtpproxy reload')

    def test_synology(self):
        start = blocks('Synology')[0].replace('/volume1', '/opt')
        self.write_ini('user=smtpproxy\ngroup=smtpproxy')
        self.sh(blocks(RIGHTS)[0] + start)
        self.assertRecipe('/opt/smtpproxy/smtpproxy.init.d reload')

    def test_entware(self):
        self.user = 'nobody'
        os.makedirs('/opt/etc/init.d')
        os.symlink('/usr/bin/python3', '/opt/bin/python3')
        self.write_ini('user=nobody')
        self.sh(blocks('QNAP, Asus, and whatever else runs Entware')[0])
        self.assertRecipe('/opt/etc/init.d/S99smtpproxy reload')


if __name__ == '__main__':
    if os.getpid() != 1:
        sys.exit(__doc__)
    subprocess.check_call(['busybox', 'ip', 'link', 'set', 'lo', 'up'])
    unittest.main()
