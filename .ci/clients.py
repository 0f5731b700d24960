"""How each real client sends a mail through the proxy.

A client is a function that returns the command and what it reads. `door`
says which way in: its mode is plain, starttls or tls, and it has a port, a
cafile, a user and a password. Each client logs in and checks the certificate.
"""
import os
import pathlib
import shlex
import smtplib
import ssl

SCRIPTS = pathlib.Path(__file__).parent / 'clients'
HOST = 'localhost'


def curl(door, sender, to, mail):
    return ['curl', '-sS', '--crlf', '--max-time', '60',
            '--url', '%s://%s:%d' % ('smtps' if door.mode == 'tls' else 'smtp',
                                     HOST, door.port),
            *(['--ssl-reqd'] if door.mode == 'starttls' else []),
            '--cacert', door.cafile,
            '--user', '%s:%s' % (door.user, door.password),
            '--mail-from', sender, '--mail-rcpt', to, '-T', '-'], mail


def swaks(door, sender, to, mail):
    tls = {'plain': [], 'starttls': ['--tls'], 'tls': ['--tls-on-connect']}
    return ['swaks', '--server', HOST, '--port', str(door.port),
            *tls[door.mode], '--tls-verify', '--tls-ca-path', door.cafile,
            '--auth', 'LOGIN', '--auth-user', door.user,
            '--auth-password', door.password, '--silent', '1',
            '--from', sender, '--to', to,
            '--data', '-'], mail[:-1]      # it adds the last line's end


def msmtp(door, sender, to, mail):
    return ['msmtp', '--host', HOST, '--port', str(door.port),
            '--tls=' + ('off' if door.mode == 'plain' else 'on'),
            '--tls-starttls=' + ('on' if door.mode == 'starttls' else 'off'),
            '--tls-trust-file=' + door.cafile,
            '--auth=plain', '--user', door.user,
            '--passwordeval', 'echo ' + shlex.quote(door.password),
            '--from', sender, '--', to], mail


def s_nail(door, sender, to, mail):
    """It writes a header of its own: give it the body only."""
    from urllib.parse import quote
    url = '%s://%s:%s@%s:%d' % (
        'smtps' if door.mode == 'tls' else 'smtp',
        quote(door.user, ''), quote(door.password, ''), HOST, door.port)
    return ['s-nail', '-:/', '-Sv15-compat', '-Sttycharset=utf-8',
            '-Smta=' + url, '-Ssmtp-auth=plain',
            '-Ssmtp-use-starttls' if door.mode == 'starttls' else
            '-Snosmtp-use-starttls',
            '-Stls-ca-file=' + door.cafile, '-Stls-verify=strict',
            '-Sfrom=' + sender, '-Smime-encoding=8bit',
            '-s', 'from s-nail', to], mail.split(b'\n\n', 1)[1]


def busybox(door, sender, to, mail):
    """It has no TLS of its own; openssl plugs in as its manual shows."""
    helper = 'openssl s_client -quiet -connect %s:%d -CAfile %s %s' % (
        HOST, door.port, door.cafile, '-verify_return_error')
    way = {'plain': ['-S', '%s:%d' % (HOST, door.port)],
           'starttls': ['-H', helper + ' -starttls smtp'],
           'tls': ['-H', helper]}
    return [os.environ['BUSYBOX_SENDMAIL'], *way[door.mode], '-f', sender,
            '-amLOGIN', '-au' + door.user, '-ap' + door.password, to], mail


def script(*command):
    def client(door, sender, to, mail):
        return [*command[:-1], str(SCRIPTS / command[-1]), door.mode,
                str(door.port), door.cafile, door.user, door.password,
                sender, to], mail
    return client


def python(door, sender, to, mail):
    """smtplib needs no process; the command is a function to call."""
    def send():
        context = ssl.create_default_context(cafile=door.cafile)
        if door.mode == 'tls':
            smtp = smtplib.SMTP_SSL(HOST, door.port, context=context)
        else:
            smtp = smtplib.SMTP(HOST, door.port)
        with smtp:
            if door.mode == 'starttls':
                smtp.starttls(context=context)
            smtp.login(door.user, door.password)
            # It repairs the line ends of a str, but not of bytes.
            smtp.sendmail(sender, to, mail.replace(b'\n', b'\r\n'),
                          ['BODY=8BITMIME'])
    return send, None


CLIENTS = {
    'curl': curl, 'swaks': swaks, 'msmtp': msmtp, 's-nail': s_nail,
    'busybox': busybox, 'perl': script('perl', 'net_smtp.pl'),
    'board': script('php', 'board.php'),
    'mailer': script('php', 'mailer.php'),
    'nodemailer': script('node', 'nodemailer.js'), 'python': python,
}
