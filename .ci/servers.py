"""Real mail servers on loopback: plain processes, all files in one folder.

    Dovecot     `pop3` and `pop3s`; it also checks the logins for Postfix
    Exim        `relay` takes mail only from an address that has just logged
                in by POP; `eximtls` wants a login and offers CRAM-MD5
    Postfix     `submission` wants STARTTLS and a login, `smtps` is the same
                in implicit TLS; `expired` and `otherhost` are too, with
                certificates that no client should accept

    python3 .ci/servers.py EXIM     starts them to play with

The configurations are in the folder servers; what stands there as @name is
filled in here. Delivered mail lies in maildirs. Only root can start them,
since each of them becomes a user of its own.
"""
import pathlib
import pwd
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time

USER, PASSWORD = 'printer', 'pass%word#1'
POP_WINDOW = 6          # seconds that a POP login opens the relay
DOORS = ('pop3', 'pop3s', 'relay', 'eximtls', 'submission', 'smtps',
         'expired', 'otherhost')
TEMPLATES = pathlib.Path(__file__).parent / 'servers'


class Template(string.Template):
    delimiter = '@'     # $ belongs to Exim and the shell


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def answers(port):
    try:
        socket.create_connection(('127.0.0.1', port), 1).close()
        return True
    except OSError:
        return False


def wait_for(condition, seconds, what):
    """Return what condition() says as soon as that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.05)
    raise TimeoutError('after %d s: %s' % (seconds, what))


class Servers:
    """All of them; once start() has returned, every port answers."""
    doors = DOORS

    def __init__(self, folder, exim=None):
        self.folder = pathlib.Path(folder)
        self.port = {door: free_port() for door in self.doors}
        mail = pwd.getpwnam('mail')
        self.values = dict(
            self.port, folder=self.folder, exim=exim, user=USER,
            password=PASSWORD, window=POP_WINDOW,
            uid=mail.pw_uid, gid=mail.pw_gid)
        self.processes = []

    def start(self):
        self.folder.chmod(0o755)
        for name in ('mail', 'exim', 'popped', 'tls'):
            (self.folder / name).mkdir()
            shutil.chown(self.folder / name, 'mail')
        try:
            self.make_certificates()
            self.start_each()
            for door, port in self.port.items():
                wait_for(lambda: answers(port), 15, 'no answer from ' + door)
        except BaseException:
            print(self.logs(), file=sys.stderr)
            self.stop()
            raise

    def start_each(self):
        self.start_dovecot()
        self.run('exim', self.values['exim'], '-bdf',
                 '-C', str(self.write('exim.conf')))
        self.start_postfix('postfix', 'main.cf', *map(smtpd, (
            ('submission', self.port['submission']),
            ('smtps', self.port['smtps'], 'good'),
            ('expired', self.port['expired'], 'expired'),
            ('otherhost', self.port['otherhost'], 'otherhost'))))

    def write(self, template, name=None, **values):
        """Fill in a template; return the path of the result."""
        path = self.folder / (name or template)
        text = Template((TEMPLATES / template).read_text())
        path.write_text(text.substitute(self.values, **values))
        return path

    def run(self, name, *command):
        """Start a server in the foreground; what it prints is in NAME.out."""
        with open(self.folder / (name + '.out'), 'wb') as out:
            process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True)
        self.processes.append(process)
        return process

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def logs(self):
        """The last lines of each server, for the reader of a failure."""
        text = ''
        for path in (*self.folder.glob('*.out'), *self.folder.glob('*.log'),
                     *self.folder.glob('exim/mainlog')):
            lines = path.read_text('latin-1').splitlines()[-8:]
            text += '\n'.join(['--- ' + path.name, *lines, ''])
        return text

    # --- how each is set up -----------------------------------------------

    def make_certificates(self):
        """ca.pem of our CA, stranger.pem of another one, and NAME.pem (key
        and certificate) for what the servers show."""
        def openssl(*arguments):
            subprocess.run(['openssl', *arguments], cwd=folder, check=True,
                           stdin=subprocess.DEVNULL, capture_output=True)

        folder = self.folder / 'tls'
        self.write('ca.cnf', 'tls/ca.cnf')
        (folder / 'index.txt').touch()
        new_key = '-newkey rsa:2048 -nodes -subj /CN=smtpproxy-test'.split()
        for ca in ('ca', 'stranger'):
            openssl('req', '-x509', *new_key, '-days', '2',
                    '-addext', 'keyUsage=critical,keyCertSign',
                    '-keyout', ca + '.key', '-out', ca + '.pem')
        localhost = 'DNS:localhost,IP:127.0.0.1'
        for name, hosts, end in (
                ('good', localhost, '20491231000000Z'),
                ('expired', localhost, '20210101000000Z'),
                ('otherhost', 'DNS:mail.other.test', '20491231000000Z')):
            openssl('req', *new_key, '-addext', 'subjectAltName=' + hosts,
                    '-keyout', name + '.key', '-out', name + '.csr')
            openssl('ca', '-batch', '-notext', '-config', 'ca.cnf',
                    '-keyfile', 'ca.key', '-cert', 'ca.pem',
                    '-startdate', '20200101000000Z', '-enddate', end,
                    '-in', name + '.csr', '-out', name + '.crt')
            shutil.chown(folder / (name + '.key'), 'mail')
            (folder / (name + '.pem')).write_bytes(
                (folder / (name + '.key')).read_bytes()
                + (folder / (name + '.crt')).read_bytes())

    def start_dovecot(self):
        (self.folder / 'users').write_text('%s:%s\n' % (USER, PASSWORD))
        self.write('notelogin').chmod(0o755)
        self.run('dovecot', 'dovecot', '-F',
                 '-c', str(self.write('dovecot.conf')))

    def start_postfix(self, name, template, *services, **values):
        base = self.folder / name
        for part in ('queue', 'data'):
            (base / part).mkdir(parents=True)
        shutil.chown(base / 'data', 'postfix')
        self.write(template, name + '/main.cf', **values)
        self.write('master.cf', name + '/master.cf',
                   services='\n'.join(services))
        # `postfix start-fg` would hide the server behind a shell script.
        subprocess.run(['postfix', '-c', str(base), 'check'], check=True,
                       capture_output=True)
        program = subprocess.check_output(
            ['postconf', '-dh', 'daemon_directory'], text=True).strip()
        return self.run(name, program + '/master', '-s', '-c', str(base))

    # --- what they saw ----------------------------------------------------

    def find(self, recipient):
        """The path of a delivered mail, or None."""
        wanted = re.compile(rb'^(X-Original-To|Envelope-to): %s$'
                            % re.escape(recipient.encode()), re.I | re.M)
        for path in self.folder.glob('mail/*/new/*'):
            with open(path, 'rb') as file:
                if wanted.search(file.read(4096).split(b'\n\n')[0]):
                    return path
        return None

    def take(self, recipient, seconds=30):
        """Wait for the mail to a recipient; take it out of the mailbox."""
        path = wait_for(lambda: self.find(recipient), seconds,
                        'nothing has arrived for ' + recipient)
        data = path.read_bytes()
        path.unlink()
        return data

    def pop_logins(self):
        log = (self.folder / 'dovecot.log').read_text()
        return log.count('pop3-login: Info: Login: user=<%s>' % USER)


def smtpd(door):
    """A line of master.cf: (name, port) or, in TLS, (name, port, cert)."""
    line = '127.0.0.1:%d inet n - n - - smtpd -o syslog_name=%s' % (
        door[1], door[0])
    if len(door) == 3:
        line += (' -o smtpd_tls_wrappermode=yes'
                 ' -o smtpd_tls_chain_files=$queue_directory/../../tls/%s.pem'
                 % door[2])
    return line


def serve(make, tell):
    """Servers by hand, until SIGTERM or ^C. make(folder) -> Servers;
    tell(servers) prints who may use them."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix='servers.'))
    servers = make(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        servers.start()
        tell(servers)
        print('CA %s/tls/ca.pem, logs and mail in %s' % (folder, folder))
        for door, port in servers.port.items():
            print('%-12s 127.0.0.1:%d' % (door, port), flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        servers.stop()
        shutil.rmtree(folder)


def main():
    serve(lambda folder: Servers(folder, sys.argv[1]),
          lambda servers: print('login %s, password %s' % (USER, PASSWORD)))


if __name__ == '__main__':
    main()
