"""The ini: every key, its default, and a clear word for every mistake."""
import os
import pwd
import sys
import unittest
from unittest import mock

import smtpproxy
import smtps
from tests.case import FolderCase
from tests.fakes import CERTIFICATE

CONFIG = {'port': 25, 'host': '', 'sleeptime': 30, 'debuglevel': 0,
          'waitafterpop': 5, 'deleteonerror': True, 'maxsize': 100000000,
          'maxconnections': 100, 'timeout': 300, 'retrydays': 5,
          'tlscert': '', 'tlskey': '', 'tlsport': 0, 'user': '', 'group': ''}
LOGGING = {'size': 1000000, 'count': 10, 'level': 'INFO'}
ACCOUNT = {'localhostname': '', 'smtphost': 'mx', 'smtpport': 25,
           'smtpsecurity': 'none', 'smtpusername': '', 'smtppassword': '',
           'smtppasswordfile': '', 'poppasswordfile': '',
           'localpasswordfile': '',
           'smtpauth': 'auto', 'smtpweaktls': False, 'tlsverify': True,
           'tlscafile': '', 'popbeforesmtp': False, 'pophost': '',
           'popport': 995, 'popssl': True, 'popusername': '',
           'poppassword': '', 'popcheckdelay': 60, 'returnpath': '',
           'replyto': '', 'forcefrom': '', 'localpassword': '', 'use': ''}

README_1_6 = """\
[config]
port=25
sleeptime=30
debuglevel=0
waitafterpop=5
deleteonerror=true
[logging]
file=smtpproxy.log
size=1000000
count=10
level=INFO
[foo@localdomain.com]
localhostname=localdomain.com
smtphost=smtp.example.com
smtpsecurity=ssl
smtpusername=username
smtppassword=password
popbeforesmtp=true
pophost=pop.example.com
popport=995
popssl=true
popusername=username
poppassword=password
popcheckdelay=60
returnpath=me@example.com
replyto=me@example.com
[bar@localdomain.com]
use=foo@localdomain.com
"""


class SettingsCase(FolderCase):
    """load() of a text."""

    def load(self, text):
        return smtpproxy.load(self.write('smtpproxy.ini', text))

    def account(self, keys):
        """The account of an ini that has this one."""
        return self.load('[a@b]\n' + keys).accounts['a@b']

    def mistakes(self, text):
        """What load() says is wrong with a text: a list of str."""
        with self.assertRaises(smtpproxy.ConfigError) as caught:
            self.load(text)
        self.assertEqual(str(caught.exception),
                         '\n'.join(caught.exception.args[0]))
        return caught.exception.args[0]

    def assertMistake(self, text, *words):
        """There is just this one mistake, and it is named with the file."""
        mistakes = self.mistakes(text)
        self.assertEqual(1, len(mistakes), mistakes)
        for word in (self.path('smtpproxy.ini'),) + words:
            self.assertIn(word, mistakes[0])


class Defaults(SettingsCase):

    def test_an_ini_with_one_server_is_enough(self):
        settings = self.load('[a@b]\nsmtphost=mx\n')

        for shape, defaults in (
                (settings.config, CONFIG), (settings.logging, LOGGING),
                (settings.accounts['a@b'], ACCOUNT)):
            for key, default in defaults.items():
                with self.subTest(key):
                    value = getattr(shape, key)
                    self.assertEqual(default, value)
                    self.assertIs(type(default), type(value))

    def test_the_log_lies_beside_the_ini_and_msgs_beside_the_script(self):
        settings = self.load('[a@b]\nsmtphost=mx\n')

        self.assertEqual(self.path('smtpproxy.log'), settings.logging.file)
        self.assertEqual(os.path.join(smtpproxy.HOME, 'msgs'),
                         settings.config.msgdir)

    def test_implicit_tls_has_a_port_of_its_own(self):
        for security, port in (('none', 25), ('tls', 25), ('ssl', 465)):
            with self.subTest(security):
                account = self.account(
                    'smtphost=mx\nsmtpsecurity=%s\n' % security)
                self.assertEqual(port, account.smtpport)

    def test_a_port_that_is_set_counts(self):
        account = self.account('smtphost=mx\nsmtpsecurity=ssl\nsmtpport=587\n')

        self.assertEqual(587, account.smtpport)

    def test_an_ini_of_1_6_works_unchanged(self):
        settings = self.load(README_1_6)

        foo = settings.account_for('foo@localdomain.com')
        self.assertEqual('smtp.example.com:465', foo.server)
        self.assertEqual('me@example.com', foo.replyto)
        self.assertTrue(foo.popbeforesmtp and settings.config.deleteonerror)
        self.assertEqual(foo, settings.account_for('bar@localdomain.com'))
        self.assertEqual([], settings.warnings)

    def test_private_networks_only_may_send(self):
        networks = smtps.Networks(self.load('').config.allow)

        for address, allowed in (
                ('127.0.0.1', 1), ('10.1.2.3', 1), ('172.16.0.1', 1),
                ('172.32.0.1', 0), ('192.168.9.9', 1), ('169.254.1.1', 1),
                ('8.8.8.8', 0), ('::1', 1), ('fd00::1', 1), ('fe80::1', 1),
                ('2001:db8::1', 0), ('::ffff:192.168.1.1', 1),
                ('::ffff:8.8.8.8', 0)):
            with self.subTest(address):
                self.assertEqual(bool(allowed), address in networks)


class Reading(SettingsCase):

    def test_what_editors_do_to_a_file_does_no_harm(self):
        text = '[a@b]\nsmtphost=mx\nsmtpusername=me\nsmtppassword=é\n'

        for name, content in (
                ('unix', text.encode()), ('windows', text.replace(
                    '\n', '\r\n').encode()), ('old mac', text.replace(
                        '\n', '\r').encode()),
                ('BOM', b'\xef\xbb\xbf' + text.encode()),
                ('no last line end', text.rstrip().encode()),
                ('blanks', text.replace('=', '  =  ').encode()),
                ('capitals', text.replace('smtp', 'SMTP').encode())):
            with self.subTest(name):
                account = self.load(content).accounts['a@b']
                self.assertEqual(('mx', 'me', 'é'), (
                    account.smtphost, account.smtpusername,
                    account.smtppassword))

    def test_a_password_stands_as_it_was_written(self):
        for password in ('50%', '%(x)s', 'a#b', 'a ;b', 'a=b:c', '"a"', '%%',
                         'a  b', '${x}', '\\n', "'", ':=', '[x]'):
            with self.subTest(password):
                account = self.account(
                    'smtphost=mx\nsmtpusername=me\nsmtppassword=%s\n'
                    % password)
                self.assertEqual(password, account.smtppassword)

    def test_comments_begin_at_the_start_of_a_line(self):
        account = self.account(
            '# one\n; two\nsmtphost=mx\n#smtpport=1\nreplyto=a#b;c@d\n')

        self.assertEqual((25, 'a#b;c@d'), (account.smtpport, account.replyto))

    def test_yes_and_no_have_many_names(self):
        for text, value in (('true', True), ('YES', True), ('on', True),
                            ('1', True), ('false', False), ('No', False),
                            ('off', False), ('0', False)):
            with self.subTest(text):
                settings = self.load('[config]\ndeleteonerror=%s\n' % text)
                self.assertIs(value, settings.config.deleteonerror)

    def test_popssl_knows_stls_too(self):
        for text, value in (('true', True), ('off', False), ('TLS', 'tls')):
            with self.subTest(text):
                account = self.account('smtphost=mx\npopssl=%s\n' % text)
                self.assertEqual(value, account.popssl)

    def test_choices_in_any_case(self):
        account = self.account(
            'smtphost=mx\nsmtpsecurity=TLS\nsmtpauth=Cram-MD5\n')
        settings = self.load('[logging]\nlevel=debug\n')

        self.assertEqual(('tls', 'cram-md5', 'DEBUG'), (
            account.smtpsecurity, account.smtpauth, settings.logging.level))

    def test_paths_are_relative_to_the_ini(self):
        self.write('ca.pem', '')
        settings = self.load('[config]\nmsgdir=m\n[logging]\nfile=l/x.log\n'
                             '[a@b]\nsmtphost=mx\ntlscafile=ca.pem\n')

        self.assertEqual(self.path('m'), settings.config.msgdir)
        self.assertEqual(self.path('l', 'x.log'), settings.logging.file)
        self.assertEqual(self.path('ca.pem'),
                         settings.accounts['a@b'].tlscafile)

    def test_handlers_have_sections_of_their_own(self):
        settings = self.load('[handler savevoice]\nEnabled=true\n'
                             'Folder=/Voice %\n')

        self.assertEqual({'savevoice': {
            'enabled': 'true', 'folder': '/Voice %'}}, settings.handlers)

    def test_no_log_line_can_print_a_password(self):
        account = self.account('smtphost=mx\nsmtpusername=me\n'
                               'smtppassword=hush\nlocalpassword=hush\n')

        self.assertNotIn('hush', repr(account))
        self.assertIn('smtphost', repr(account))


class Accounts(SettingsCase):

    def test_the_most_precise_account_counts_in_any_case(self):
        settings = self.load('[Me@Home.lan]\nsmtphost=exact\n'
                             '[*@HOME.lan]\nsmtphost=domain\n'
                             '[DEFAULT]\nsmtphost=default\n')

        for sender, host in (
                ('me@home.lan', 'exact'), ('ME@HOME.LAN', 'exact'),
                ('you@home.lan', 'domain'), ('me@sub.home.lan', 'default'),
                ('', 'default'), ('root', 'default')):
            with self.subTest(sender):
                self.assertEqual(host, settings.account_for(sender).smtphost)

    def test_without_a_default_a_stranger_has_no_account(self):
        settings = self.load('[*@home.lan]\nsmtphost=mx\n')

        for sender in ('me@elsewhere.lan', '', 'home.lan', 'config'):
            with self.subTest(sender):
                self.assertIsNone(settings.account_for(sender))

    def test_use_takes_another_account_over_any_number_of_steps(self):
        settings = self.load('[a@b]\nuse=C@d\n[c@d]\nuse=default\n'
                             '[default]\nsmtphost=mx\n[*@e]\nuse=a@b\n')

        for sender in ('a@b', 'c@d', 'x@e'):
            with self.subTest(sender):
                self.assertEqual('mx', settings.account_for(sender).smtphost)

    def test_use_that_leads_nowhere_is_named(self):
        host = '[default]\nsmtphost=mx\n'

        self.assertMistake(host + '[a@b]\nuse=defualt\n', '[a@b] use',
                           'defualt', 'do you mean default?')
        self.assertMistake('[a@b]\nuse=A@B\n', '[a@b] use', 'a@b -> a@b')
        self.assertMistake(host + '[a@b]\nuse=default\nsmtpport=1\n',
                           '[a@b] use', 'only key')
        circle = self.mistakes('[a@b]\nuse=c@d\n[c@d]\nuse=a@b\n')
        self.assertIn('[a@b] use goes round in a circle', circle[0])


class Mistakes(SettingsCase):

    def test_an_unknown_key_is_named_with_the_nearest(self):
        for text, *words in (
                ('[config]\nprot=1\n', '[config] prot', 'do you mean port?'),
                ('[logging]\nlevle=INFO\n', '[logging] levle', 'level?'),
                ('[a@b]\nsmtphost=x\nsmptport=1\n', '[a@b] smptport',
                 'do you mean smtpport?'),
                ('[a@b]\nsmtphost=x\nport=1\n', '[a@b] port', '[config]'),
                ('[config]\nsmtphost=x\n', '[config] smtphost', 'account'),
                ('[config]\nzzzz=1\n', '[config] zzzz', 'known are')):
            with self.subTest(text):
                self.assertMistake(text, *words)

    WRONG = (
        ('config', 'port=x', '65535'),
        ('config', 'port=65536', '65535'),
        ('config', 'port=-1', 'whole number'),
        ('config', 'sleeptime=', 'whole number'),
        ('config', 'sleeptime=1.5', 'whole number'),
        ('config', 'sleeptime=0', 'from 1 to 86400'),
        ('config', 'timeout=0', 'from 1 to 86400'),
        ('config', 'timeout=86401', 'from 1 to 86400'),
        ('config', 'maxsize=0', 'from 1 to 10000000000'),
        ('config', 'maxsize=1' + '0' * 5000, 'to 10000000000'),
        ('config', 'maxconnections=10001', 'to 10000'),
        ('config', 'retrydays=366', 'to 365'),
        ('config', 'tlsport=65536', '65535'),
        ('config', 'deleteonerror=maybe', 'true or false'),
        ('config', 'allow=192.168.1.0/33', 'any'),
        ('config', 'allow=home', 'any'),
        ('config', 'allow=', 'any'),
        ('config', 'user=no-such-user', 'not known'),
        ('config', 'tlsport=465', 'tlscert'),
        ('logging', 'level=LOUD', 'WARNING'),
        ('default', 'smtpport=65536', '65535'),
        ('default', 'popport=65536', '65535'),
        ('default', 'smtpport=0', 'from 1 to 65535'),
        ('default', 'popport=0', 'from 1 to 65535'),
        ('default', 'smtpconnections=101', 'from 1 to 100'),
        ('default', 'smtpsecurity=starttls', 'none, tls, ssl'),
        ('default', 'smtpauth=ntlm', 'cram-md5'),
        ('default', 'replyto=me', 'mail address'),
        ('default', 'forcefrom=a@b <c', 'mail address'),
        ('default', 'forcefrom=Me <bücher@b>', 'ASCII'),
        ('default', 'replyto=me@bücher.example', 'ASCII'),
        ('default', 'returnpath=bücher@b', 'ASCII'),
        ('default', 'localhostname=my box', 'blanks'),
        ('default', 'tlscafile=none.pem', 'no such file'))

    def test_a_wrong_value_is_named_with_what_is_right(self):
        for section, line, right in self.WRONG:
            with self.subTest(line):
                host = 'smtphost=mx\n' if section == 'default' else ''
                self.assertMistake('[%s]\n%s%s\n' % (section, host, line),
                                   '[%s]' % section, line.partition('=')[0],
                                   right)

    def test_two_things_in_one_place_are_named(self):
        self.assertMistake(
            '[config]\nport=465\ntlsport=465\ntlscert=%s\ntlskey=%s\n' % (
                CERTIFICATE, CERTIFICATE), '[config] tlsport', 'port=')
        for file in 'mails/x.log', 'link/x.log', 'mails/log/x.log':
            with self.subTest(file):
                if not os.path.lexists(self.path('link')):
                    os.symlink('mails', self.path('link'))
                self.assertMistake('[config]\nmsgdir=mails\n[logging]\n'
                                   'file=%s\n' % file,
                                   '[logging] file', 'msgdir=')

    def test_what_must_be_there_is_named(self):
        pop = 'smtphost=mx\npopbeforesmtp=true\n'
        values = {'pophost': 'x', 'popusername': 'y', 'poppassword': 'z'}

        self.assertMistake('[a@b]\n', '[a@b] smtphost is missing')
        self.assertMistake('[a@b]\nsmtphost=\n', 'smtphost is missing')
        for missing in values:
            with self.subTest(missing):
                self.assertMistake('[a@b]\n' + pop + ''.join(
                    '%s=%s\n' % pair for pair in values.items()
                    if pair[0] != missing), missing + ' is missing')

    def test_what_the_log_leaves_to_its_owner_has_to_be_replaced(self):
        for key in 'smtphost', 'smtpusername', 'smtppassword':
            with self.subTest(key):
                self.assertMistake('[a@b]\n%s%s=<your own there>\n' % (
                    '' if key == 'smtphost' else 'smtphost=mx\n', key),
                    key, 'replace this by yours')

    def test_what_is_there_twice_is_named(self):
        for text, *words in (
                ('[config]\nport=1\nPORT=2\n', '[config] port', 'twice', '3'),
                ('[a@b]\nsmtphost=x\n[a@b]\nsmtphost=y\n', '[a@b]', 'twice'),
                ('[a@b]\nsmtphost=x\n[A@B]\nsmtphost=y\n', '[A@B]', 'twice'),
                ('[config]\nport=1\n[Config]\nhost=::1\n', 'onfig]', 'twice'),
                ('[logging]\ncount=1\n[LOGGING]\nsize=1\n', 'twice')):
            with self.subTest(text):
                self.assertMistake(text, *words)

    def test_a_value_is_one_line(self):
        self.assertMistake('[config]\nhost=::1\n  port=3\n', '[config] host',
                           'more than one line')

    def test_what_is_no_ini_at_all_is_named_by_its_line(self):
        self.assertMistake('port=25\n[config]\n', 'line 1', 'section')
        self.assertMistake('[config]\nport 25\n', 'line 2', 'key=value')
        self.assertMistake(b'[config]\nhost=\xff\n', 'UTF-8')
        self.assertMistake('[a@b]\nsmtphost=m\0x\n', 'control characters')

    def test_all_mistakes_are_named_at_once(self):
        mistakes = '\n'.join(self.mistakes(
            'lost=1\n[config]\nport=x\nprot=1\nport=2\nallow=no\nnonsense\n'
            '[a@b]\nsmtpport=y\n[a@b]\nsmtphost=z\n[c@d]\nuse=e@f\n'
            '[logging]\nlevel=LOUD\n'))

        for word in ('line 1:', 'port = x', 'prot', 'port is there twice',
                     'allow', 'line 7:', '[a@b] smtphost is missing',
                     'smtpport = y', '[a@b] is there twice', 'e@f', 'LOUD'):
            with self.subTest(word):
                self.assertIn(word, mistakes)

    def test_a_mistake_never_shows_a_password(self):
        mistakes = self.mistakes('[a@b]\nsmtphost=mx\nsmtppassword=hu\1sh\n')

        self.assertNotIn('hu', mistakes[0].partition('smtppassword')[2])


ME = 'oauth=microsoft\noauthclientid=id\nsmtpusername=me@example.org\n'
OTHER = ('oauth=other\noauthclientid=id\nsmtpusername=me@example.org\n'
         'smtphost=mx.example.org\nsmtpsecurity=tls\noauthscope=mail\n'
         'oauthtokenurl=https://login.example.org/token\n')
URL = 'https://login.microsoftonline.com/common/oauth2/v2.0/'


class OAuth(SettingsCase):

    def test_four_lines_are_an_account_at_microsoft(self):
        account = self.account(ME)

        for key, value in {
                'smtphost': 'smtp.office365.com', 'smtpport': 587,
                'smtpsecurity': 'tls', 'smtpconnections': 2,
                'oauthflow': 'device', 'oauthtokenurl': URL + 'token',
                'oauthdeviceurl': URL + 'devicecode',
                'oauthauthurl': URL + 'authorize', 'oauthscope':
                'https://outlook.office.com/SMTP.Send offline_access'}.items():
            with self.subTest(key):
                self.assertEqual(value, getattr(account, key))

    def test_four_lines_are_an_account_at_google(self):
        account = self.account(ME.replace('microsoft', 'Google'))

        self.assertEqual(('smtp.gmail.com', 587, 'tls', 'browser',
                          'https://mail.google.com/'), (
            account.smtphost, account.smtpport, account.smtpsecurity,
            account.oauthflow, account.oauthscope))

    def test_what_the_owner_sets_stays(self):
        account = self.account(
            ME + 'smtphost=mx\nsmtpsecurity=ssl\nsmtpconnections=1\n'
            'oauthscope=x y\noauthtenant=example.org\noauthauthurl=https://a/b'
            '\noauthflow=browser\nsmtpauth=oauthbearer\n')

        self.assertEqual(('mx', 465, 1, 'x y', 'https://a/b', 'browser'), (
            account.smtphost, account.smtpport, account.smtpconnections,
            account.oauthscope, account.oauthauthurl, account.oauthflow))
        self.assertIn('/example.org/', account.oauthtokenurl)

    def test_a_pace_of_0_is_no_limit_and_not_the_providers(self):
        self.assertEqual([30, 0, 20], [
            self.account(ME + rate).smtprate
            for rate in ('', 'smtprate=0\n', 'smtprate=20\n')])

    def test_an_app_asks_for_what_it_may_have(self):
        account = self.account(ME + 'oauthflow=app\noauthclientsecret=x\n'
                               'oauthtenant=example.org\n')

        self.assertEqual('https://outlook.office365.com/.default',
                         account.oauthscope)

    def test_another_provider_has_the_flow_that_it_has_an_address_for(self):
        device = self.account(OTHER + 'oauthdeviceurl=https://a/d\n')
        browser = self.account(OTHER + 'oauthauthurl=http://127.0.0.1:1/a\n')

        self.assertEqual(('device', 'browser'),
                         (device.oauthflow, browser.oauthflow))

    def test_each_mistake_is_named(self):
        for text, *words in (
                (ME + 'smtppassword=hush', 'smtppassword', 'exclude'),
                (ME.replace('smtpusername', '#'), 'smtpusername', 'missing'),
                (ME.replace('oauthclientid', '#'), 'oauthclientid', 'missing'),
                (ME.replace('microsoft', 'gogle'), 'oauth =', 'google'),
                (ME + 'oauthtokenurl=http://a/b', 'oauthtokenurl', 'https'),
                (ME + 'oauthauthurl=a/b', 'oauthauthurl', 'https'),
                (ME + 'oauthtokenurl=https://a:x/', 'oauthtokenurl', 'https'),
                (ME + 'oauthtokenurl=https://u:p@a/', 'oauthtokenurl'),
                (ME + 'smtpsecurity=none', 'smtpsecurity', 'tls or ssl'),
                (ME + 'oauthflow=app\noauthtenant=me.org',
                 'oauthclientsecret', 'missing'),
                (ME + 'oauthflow=app\noauthclientsecret=x', 'oauthtenant'),
                (ME + 'oauthtenant=a/b', 'oauthtenant = a/b'),
                (ME + 'oauthflow=code', 'oauthflow', 'device'),
                (ME + 'smtpauth=plain', 'smtpauth', 'xoauth2'),
                (ME + 'oauthport=70000', 'oauthport', '65535'),
                (ME.replace('microsoft', 'google') + 'oauthflow=app\n'
                 'oauthclientsecret=x', 'oauthflow', 'browser'),
                (OTHER.replace('oauthtokenurl', '#')
                 + 'oauthauthurl=https://a/b', 'oauthtokenurl', 'missing'),
                (OTHER.replace('oauthscope', '#') + 'oauthauthurl=https://a/b',
                 'oauthscope', 'missing'),
                (OTHER, 'oauthauthurl', 'missing'),
                (OTHER + 'oauthflow=device', 'oauthdeviceurl', 'missing'),
                ('smtphost=mx\noauthclientid=x', 'oauthclientid', 'oauth='),
                ('smtphost=mx\nsmtpauth=xoauth2', 'smtpauth', 'oauth=')):
            with self.subTest(text):
                self.assertMistake('[a@b]\n%s\n' % text, '[a@b]', *words)

    def test_plain_text_is_fine_as_long_as_it_stays_on_the_box(self):
        for host in '127.0.0.1', 'localhost', '::1':
            account = self.account(ME + 'smtpsecurity=none\nsmtphost=' + host)

            self.assertEqual('none', account.smtpsecurity)

    def test_sections_with_one_sign_in_must_agree(self):
        for key in ('oauthscope=x', 'oauthflow=browser',
                    'oauthtenant=example.org', 'oauthclientsecret=hush'):
            with self.subTest(key):
                self.assertMistake(
                    '[a@b]\n%s[c@d]\n%s%s\n' % (ME, ME.upper().replace(
                        '=ID', '=id'), key), '[c@d]', key.partition('=')[0],
                    '[a@b]')

    def test_they_must_as_well_if_one_names_the_token_address_itself(self):
        named = ME + 'oauthtokenurl=%stoken\noauthscope=x\n' % URL
        for one, two in (named, ME), (ME, named):
            self.assertMistake('[a@b]\n%s[c@d]\n%s' % (one, two), '[c@d]',
                               'oauthscope', '[a@b]')

    def test_an_empty_key_agrees_with_none(self):
        settings = self.load('[a@b]\n%s[c@d]\n%soauthtenant=\n'
                             'oauthclientsecret=\n' % (ME, ME))

        self.assertEqual(1, len(settings.grants))

    def test_one_sign_in_is_known_by_the_section_that_holds_its_keys(self):
        settings = self.load('[x@y]\nuse=A@b\n[A@b]\n%s[c@d]\n%s[e@f]\n%s' % (
            ME, ME + 'replyto=a@b\n', ME.replace('=id', '=another')))

        self.assertEqual(['a@b', 'e@f'], list(settings.grants.values()))
        self.assertEqual('a@b', settings.grants[
            settings.accounts['x@y'].grant])

    def test_a_secret_is_masked_like_a_password(self):
        account = self.account(ME + 'oauthclientsecret=hush\n')
        mistakes = self.mistakes('[a@b]\n%soauthclientsecret=hu\1sh\n' % ME)

        self.assertNotIn('hush', repr(account))
        self.assertNotIn('sh', mistakes[0].partition('secret')[2][:20])

    def test_sign_ins_are_kept_beside_the_ini_in_a_folder_of_their_own(self):
        self.assertEqual(self.path('tokens'),
                         self.load('[config]\n').config.tokendir)
        self.assertMistake('[config]\nmsgdir=m\ntokendir=m\n', 'tokendir')
        self.assertMistake('[config]\ntokendir=.\n', 'tokendir')


class Warnings(SettingsCase):

    def warnings(self, text, mode=0o600):
        path = self.write('smtpproxy.ini', text)
        os.chmod(path, mode)
        return '\n'.join(
            warning for warning in smtpproxy.load(path).warnings
            if not warning.startswith(smtpproxy.HOME))

    def test_stls_on_the_port_where_tls_begins_at_once(self):
        account = '[a@b]\nsmtphost=mx\npopssl=tls\n'

        self.assertIn('popssl=true', self.warnings(account))
        self.assertEqual('', self.warnings(account + 'popport=110\n'))

    def test_an_ini_with_passwords_that_others_can_read(self):
        secret = '[a@b]\nsmtphost=mx\nlocalpassword=x\n'

        for mode in 0o644, 0o604, 0o660, 0o650:
            with self.subTest(oct(mode)):
                self.assertIn('chmod 600', self.warnings(secret, mode))
        self.assertEqual('', self.warnings(secret, 0o600))
        self.assertEqual('', self.warnings('[a@b]\nsmtphost=mx\n', 0o644))

    def test_the_group_of_the_service_may_read_the_ini(self):
        secret = '[a@b]\nsmtphost=mx\nlocalpassword=x\n'

        self.assertEqual('', self.warnings(secret, 0o640))

        if os.getuid() == 0:
            nobody = pwd.getpwnam('nobody').pw_gid
            user = secret + '[config]\nuser=nobody\n'
            self.assertIn('chgrp %d ' % nobody, self.warnings(user, 0o640))
            os.chown(self.path('smtpproxy.ini'), 0, nobody)
            self.assertEqual('', self.warnings(user, 0o640))
            self.assertIn('chmod 600', self.warnings(secret, 0o640))

    @unittest.skipUnless(os.getuid() == 0, 'needs root')
    def test_root_knows_the_group_of_a_service_that_systemd_starts(self):
        nobody = pwd.getpwnam('nobody')
        secret = self.write('smtpproxy.ini', '[config]\nmsgdir=msgs\n[a@b]\n'
                            'smtphost=mx\nlocalpassword=x\n')
        os.mkdir(self.path('msgs'), 0o700)
        os.chown(self.path('msgs'), nobody.pw_uid, nobody.pw_gid)
        os.chown(secret, 0, nobody.pw_gid)

        with open(secret) as file:
            self.assertEqual('', self.warnings(file.read(), 0o640))

    def test_a_msgs_that_others_may_look_into(self):
        text = '[config]\nmsgdir=msgs\n[a@b]\nsmtphost=mx\n'
        os.mkdir(self.path('msgs'))

        for mode in 0o755, 0o750, 0o702:
            with self.subTest(oct(mode)):
                os.chmod(self.path('msgs'), mode)
                self.assertIn('chmod 700 ' + self.path('msgs'),
                              self.warnings(text))
        os.chmod(self.path('msgs'), 0o700)
        self.assertEqual('', self.warnings(text))

    def test_a_password_that_1_x_read_differently(self):
        warnings = self.warnings(
            '[a@b]\nsmtphost=mx\nsmtpusername=x\nsmtppassword=50%%\n')

        self.assertIn('[a@b] smtppassword has %%', warnings)

    def test_an_account_that_will_not_log_in(self):
        warnings = self.warnings('[a@b]\nsmtphost=mx\nsmtpusername=x\n')

        self.assertIn('[a@b] has smtpusername or smtppassword', warnings)

    OF_1_X = (('config', 'sleeptime', 86400), ('config', 'debuglevel', 2),
              ('config', 'waitafterpop', 3600),
              ('logging', 'size', 1000000000), ('logging', 'count', 1000),
              ('a@b', 'popcheckdelay', 86400))

    def test_a_number_of_1_x_that_is_too_large_is_brought_down(self):
        for section, key, most in self.OF_1_X:
            for number in str(most + 1), '1' + '0' * 17, '1' + '0' * 5000:
                with self.subTest(key, digits=len(number)):
                    text = self.ini(section, key, number)
                    self.assertIn('[%s] %s = %s' % (section, key, number),
                                  self.warnings(text))
                    settings = self.load(text)
                    self.assertEqual(most, getattr(settings.accounts.get(
                        section, getattr(settings, section, None)), key))

    @staticmethod
    def ini(section, key, value):
        """One with an account, without a warning if the value is fine."""
        return '[%s]\n%s=%s\n%s' % (section, key, value, (
            '' if section == 'a@b' else '[a@b]\n') + 'smtphost=mx\n')

    def test_the_largest_number_itself_is_no_warning(self):
        for section, key, most in self.OF_1_X:
            with self.subTest(key):
                self.assertEqual('', self.warnings(
                    self.ini(section, key, most)))

    def test_sections_that_could_share_a_login_but_do_not(self):
        smtp = {'smtphost': 'mx', 'smtpusername': 'me', 'smtppassword': 'pw'}
        pop = {'smtphost': 'mx', 'popbeforesmtp': 'true', 'pophost': 'mx',
               'popusername': 'me', 'poppassword': 'pw'}
        for keys, other, counts_apart in (
                (smtp, {'replyto': 'x@y'}, False),
                (smtp, {'smtphost': 'my'}, False),
                (smtp, {'smtpusername': 'you'}, False),
                (smtp, {'smtpauth': 'plain'}, True),
                (smtp, {'smtpport': '587', 'smtpsecurity': 'tls'}, True),
                (smtp, {'smtphost': 'MX'}, True),
                (smtp, {'smtpusername': 'Me'}, True),
                (pop, {'replyto': 'x@y'}, False),
                (pop, {'popcheckdelay': '300'}, True),
                (dict(pop, popbeforesmtp='false'), {'smtpport': '26'}, False)):
            ini = ''.join('[%s]\n%s' % (name, ''.join(
                '%s=%s\n' % pair for pair in section.items()))
                for name, section in (('a@b', keys), (
                    'e@f', dict(keys, **other))))
            with self.subTest(ini):
                self.assertEqual(
                    counts_apart, '[a@b], [e@f] have the same smtphost and '
                    'user' in self.warnings(ini))

    # smtphost, and what the warning says of it
    HOSTS = (('smtp.x.com:587', 'only smtp.x.com; 587 has a key of its own'),
             ('smtp://smtp.x.com', 'only smtp.x.com'),
             ('smtps://smtp.x.com:465/', 'only smtp.x.com; 465 has'),
             ('"smtp.x.com"', 'only smtp.x.com'), ('"mx":25', 'only mx'),
             ('smtp.x.com # GMX', 'only smtp.x.com'),
             ('mx;comment', 'only mx'), ('mx, my', 'only mx'),
             ('[::1]', 'only ::1'), ('[::1]:25', 'only ::1; 25 has'),
             ('me@x.com', 'no mail address; x.com, perhaps?'),
             ('smtp://me:secret@mx:25', 'mx, perhaps?'))

    def test_a_host_that_is_more_than_a_name_is_told_what_was_meant(self):
        for key in 'smtphost', 'pophost', 'host':
            section = 'config' if key == 'host' else 'a@b'
            for text, meant in self.HOSTS:
                with self.subTest(key, text=text):
                    warnings = self.warnings('[%s]\n%s=%s\n%s' % (
                        section, key, text, {
                            'pophost': 'smtphost=mx\n', 'smtphost': '',
                            'host': '[a@b]\nsmtphost=mx\n'}[key]))
                    self.assertIn('[%s] %s ' % (section, key), warnings)
                    self.assertIn(meant, warnings)
                    self.assertNotIn('secret', warnings)

    def test_a_name_and_an_address_are_hosts(self):
        for host in ('mx', 'smtp.x.com', 'bücher.example', '192.0.2.1', '::1',
                     'fe80::1%eth0', '2001:db8::25', 'my_box.lan.'):
            with self.subTest(host):
                self.assertEqual('', self.warnings(
                    '[a@b]\nsmtphost=%s\n' % host))

    def test_a_section_that_no_sender_has_is_told_what_was_meant(self):
        for name, meant in (
                ('Printer <p@home.lan>', 'p@home.lan'), ('<p@x>', 'p@x'),
                ('"p@x"', 'p@x'), ('@home.lan', '*@home.lan'),
                ('p*@home.lan', '*@home.lan'), ('*', 'default'),
                ('*@*', 'default')):
            with self.subTest(name):
                self.assertIn('do you mean [%s]?' % meant, self.warnings(
                    '[%s]\nsmtphost=mx\n' % name))

    def test_an_ini_without_an_account(self):
        self.assertIn('no account', self.warnings('[config]\n'))


class PasswordFiles(SettingsCase):

    KEYS = 'smtppassword', 'poppassword', 'localpassword'

    def test_the_first_line_of_the_file_is_the_password(self):
        for content in (b'se cret#\n', b'se cret#\r\nmore\n', b'se cret#',
                        b'\xef\xbb\xbfse cret#\n'):
            for key in self.KEYS:
                with self.subTest(key, content=content):
                    self.write('secret', content)
                    account = self.account(
                        'smtphost=mx\n%sfile=secret\n' % key)
                    self.assertEqual('se cret#', getattr(account, key))
                    self.assertEqual(self.path('secret'),
                                     getattr(account, key + 'file'))

    def test_an_account_is_complete_with_files(self):
        self.write('secret', 'x')
        settings = self.load(
            '[a@b]\nsmtphost=mx\nsmtpusername=me\nsmtppasswordfile=secret\n'
            'popbeforesmtp=true\npophost=pop\npopusername=me\n'
            'poppasswordfile=secret\n')

        self.assertEqual(([], []), (settings.missing, [
            line for line in settings.warnings if 'login' in line]))

    def test_a_password_and_its_file_exclude_each_other(self):
        self.write('secret', 'x')
        for key in self.KEYS:
            with self.subTest(key):
                self.assertMistake(
                    '[a@b]\nsmtphost=mx\n%s=y\n%sfile=secret\n' % (key, key),
                    '[a@b] %s and %sfile' % (key, key))

    UNREADABLE = (('no such file', None), ('nothing', b''), ('blank', b' \nx'),
                  ('control characters', b'x\0y'), ('no UTF-8', b'\xff'))

    def test_a_file_that_cannot_be_read_is_named_but_not_shown(self):
        for what, content in self.UNREADABLE:
            with self.subTest(what):
                if content is not None:
                    self.write('secret', content)
                settings = self.load(
                    '[a@b]\nsmtphost=mx\nsmtppasswordfile=secret\n')
                line, = settings.missing
                self.assertIn('[a@b] smtppasswordfile = %s cannot be read: '
                              % self.path('secret'), line)
                self.assertEqual('', settings.accounts['a@b'].smtppassword)

    def test_a_file_that_anybody_can_read_is_a_warning(self):
        path = self.write('secret', 'x')
        text = '[a@b]\nsmtphost=mx\nlocalpasswordfile=secret\n'
        for mode in 0o600, 0o640, 0o440:
            os.chmod(path, mode)
            self.assertNotIn('password in it', str(self.load(text).warnings))

        os.chmod(path, 0o644)

        self.assertIn('chmod o-rwx %s' % path, str(self.load(text).warnings))


@unittest.skipUnless(os.getuid() == 0, 'needs root')
class RootRunsIt(SettingsCase):
    """Whoever may change what root runs becomes root."""

    def setUp(self):
        super().setUp()
        for name in 'code/smtpproxy.py', 'code/handlers/mine.py':
            self.write(name, '')
        self.write('smtpproxy.ini', '[a@b]\nsmtphost=mx\n')
        home = self.path('code')
        for patch in (mock.patch.object(smtpproxy, 'HOME', home),
                      mock.patch.object(sys, 'path', [home] + sys.path)):
            patch.start()
            self.addCleanup(patch.stop)

    def warnings(self):
        return smtpproxy.load(self.path('smtpproxy.ini')).warnings

    def test_what_is_roots_alone_makes_no_warning(self):
        self.assertEqual([], self.warnings())

    def test_what_others_may_change_is_named(self):
        for name in ('code', 'code/smtpproxy.py', 'code/handlers',
                     'code/handlers/mine.py', 'smtpproxy.ini', '.'):
            for change in ((os.chown, 65534, -1), (os.chmod, 0o777)):
                with self.subTest(name, change=change):
                    path = self.path(name).replace('/.', '')
                    change[0](path, *change[1:])

                    warning, = self.warnings()

                    self.assertTrue(warning.startswith(path + ': '), warning)
                    self.assertIn('chown root %s;' % path, warning)
                    os.chown(path, 0, -1)
                    os.chmod(path, 0o700)

    def test_the_current_folder_counts_with_python_m(self):
        os.mkdir(self.path('here'))
        os.chown(self.path('here'), 65534, -1)
        sys.path[0] = self.path('here')

        warning, = self.warnings()

        self.assertIn(self.path('here'), warning)

    def test_roots_link_is_as_good_as_its_folder(self):
        os.rename(self.path('code'), self.path('usb'))
        os.symlink(self.path('usb'), self.path('code'))
        self.assertEqual([], self.warnings())

        os.lchown(self.path('code'), 65534, -1)

        self.assertIn('others than root', ''.join(self.warnings()))


if __name__ == '__main__':
    unittest.main()
