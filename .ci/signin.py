"""The other end of a sign-in by OAuth2, on loopback.

    oidc-provider   the token server: device code, browser with PKCE, app;
                    who uses a refresh token twice loses the sign-in
    Dovecot         `submission`: takes XOAUTH2 and OAUTHBEARER and asks the
                    token server about each token
    Postfix         `sink`: where Dovecot passes the mail on to
    Person          who opens the addresses, types the code and consents

    NODE_PATH=DIR python3 .ci/signin.py     starts them to play with

Each person's name is an address; it is the mailbox that the token is for.
"""
import html.parser
import http.cookiejar
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request

from servers import TEMPLATES, Servers, serve, smtpd

SECRET = 'secret/of+the=client'
MAILBOX = 'printer@home.test'           # the one that the client `app` may use
PUBLIC, CONFIDENTIAL, APP = 'box', 'desktop', 'app'     # the clients' ids


class TokenServers(Servers):
    doors = ('oidc', 'oidctls', 'submission', 'pop3', 'sink')

    def start_each(self):
        port = self.port
        settings = self.folder / 'oidc.json'
        settings.write_text(json.dumps({
            'port': port['oidc'], 'tlsport': port['oidctls'],
            'pem': str(self.folder / 'tls/good.pem'),
            'secret': SECRET, 'mailbox': MAILBOX}))
        self.run('oidc', 'node', str(TEMPLATES / 'oidc.js'), str(settings))
        self.write('introspection.conf')
        self.run('dovecot', 'dovecot', '-F',
                 '-c', str(self.write('submission.conf')))
        self.start_postfix('postfix', 'main.cf', smtpd(
            ('sink', port['sink'])) + ' -o smtpd_tls_security_level=none'
            ' -o smtpd_sasl_auth_enable=no'
            ' -o smtpd_recipient_restrictions=reject_unauth_destination')
        self.tokens = TokenServer('http://127.0.0.1:%d' % port['oidc'])

    def recipients(self):
        """Who has got mail, in no order; twice is twice."""
        found = []
        for path in self.folder.glob('mail/*/new/*'):
            with open(path, 'rb') as file:
                for line in file:
                    if line.startswith(b'X-Original-To: '):
                        found.append(line[15:].strip().decode())
                        break
        return found


# --- The token server --------------------------------------------------------

class TokenServer:
    """What tests ask of it beside the protocol; see servers/oidc.js."""

    def __init__(self, url):
        self.url = url

    def _ask(self, path, data=None):
        with OPENER.open(self.url + path, data, 10) as answer:
            return json.load(answer)

    def change(self, **rules):
        self._ask('/admin', json.dumps(rules).encode())

    def reset(self):
        self.change(ttl=3600, bits=256, interval=1, before=0, after=0)

    def expire(self):
        """Forget the access tokens, whatever was said about their time."""
        self._ask('/admin/expire', b'')

    def revoke(self):
        """End the sign-ins of all persons."""
        self._ask('/admin/revoke', b'')

    def requests(self, *grants, since=0):
        """What was asked for at the token address, as dicts; oldest first."""
        return [request for request in self._ask('/admin')['requests'][since:]
                if not grants or request.get('grant') in grants]

    def secrets(self):
        """All tokens, codes, verifiers and secrets that it has seen."""
        return self._ask('/admin')['secrets']

    def post(self, path, **form):
        """Status and JSON of an answer, as any client gets it."""
        data = urllib.parse.urlencode(form).encode()
        try:
            with OPENER.open(self.url + path, data, 10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


# Never through a proxy that the machine may be told to use.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


# --- The person --------------------------------------------------------------

class Form(html.parser.HTMLParser):
    """The first form of a page (None if there is none), and the link that
    says no."""

    def __init__(self, page):
        super().__init__()
        self.action, self.fields, self.link, self.closed = None, {}, None, 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == 'form' and self.action is None:
            self.action = attributes['action']
        elif tag == 'input' and not self.closed and 'name' in attributes:
            self.fields[attributes['name']] = attributes.get('value', '')
        elif tag == 'a' and '/abort' in attributes.get('href', ''):
            self.link = attributes['href']

    def handle_endtag(self, tag):
        self.closed |= tag == 'form'


class StayHere(urllib.request.HTTPRedirectHandler):
    """Follows the server's own redirects; one that leads away from it ends
    as an HTTPError whose header says where to."""

    def redirect_request(self, request, *arguments):
        *_, address = arguments
        if urllib.parse.urlsplit(address).netloc != request.host:
            return None
        return super().redirect_request(request, *arguments)


class Person:
    """With a browser that has no window; signs in with any password."""

    def __init__(self, name=MAILBOX, cafile=None, consents=True):
        self.name, self.consents = name, consents
        self.browser = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), StayHere(),
            urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()),
            urllib.request.HTTPSHandler(
                context=ssl.create_default_context(cafile=cafile)))

    def open(self, address, data=None):
        """(page, None), or (None, where it leads to) at another server."""
        try:
            with self.browser.open(address, data, 10) as answer:
                return answer.read().decode(), None
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (302, 303):
                    return None, error.headers['Location']
                if error.code == 400:           # "it was refused", says
                    return error.read().decode(), None      # the last page
                raise

    def sign_in(self, address, code=''):
        """Open an address and fill in what is asked for, to the end; return
        the last page, or the address that the browser is sent to."""
        answers = {'user_code': code, 'login': self.name, 'password': 'any'}
        page, away = self.open(address)
        for _ in range(10):
            form = Form(page or '')
            if away or form.action is None:
                return away or page
            if form.link and not self.consents:
                page, away = self.open(form.link)
                return away or page
            data = urllib.parse.urlencode({
                name: answers.get(name) or value
                for name, value in form.fields.items()}).encode()
            page, away = self.open(form.action, data)
        raise AssertionError('the pages do not end:\n' + page)


def main():
    serve(TokenServers, tell)


def tell(servers):
    print('clients %s (no secret), %s and %s; scope smtp.send; secret %s'
          % (PUBLIC, CONFIDENTIAL, APP, SECRET))
    print('http://127.0.0.1:%d: /device/auth, /auth, /token, /admin'
          % servers.port['oidc'])


if __name__ == '__main__':
    main()
