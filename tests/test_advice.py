"""What the program makes of replies, word for word as providers send them.
Names, addresses and ids in them are neutral."""
import poplib
import re
import smtplib
import socket
import unittest

import smtpproxy
import smtps

GMAIL, RELAY, GOOGLE_MX = ('smtp.gmail.com', 'smtp-relay.gmail.com',
                           'gmail-smtp-in.l.google.com')
M365, OUTLOOK = 'smtp.office365.com', 'smtp-mail.outlook.com'
OUTLOOK_MX = 'example-org.mail.protection.outlook.com'
YAHOO, AOL, ICLOUD = ('smtp.mail.yahoo.com', 'smtp.aol.com',
                      'smtp.mail.me.com')
GMX, WEBDE, IONOS = 'mail.gmx.net', 'smtp.web.de', 'smtp.ionos.de'
YANDEX, MAILRU, ZOHO = 'smtp.yandex.com', 'smtp.mail.ru', 'smtp.zoho.eu'
SES = 'email-smtp.eu-west-1.amazonaws.com'
SENDGRID, BREVO = 'smtp.sendgrid.net', 'smtp-relay.brevo.com'
MAILGUN, SMTP2GO = 'smtp.mailgun.org', 'mail.smtp2go.com'
GODADDY, ORANGE = 'smtpout.secureserver.net', 'smtp.orange.fr'
HOST = 'mail.example.com'       # some hoster's Postfix, Exim, Exchange...
AADSTS, GOOGLE_TOKEN = 'login.microsoftonline.com', 'oauth2.googleapis.com'

# kind, a word of the sentence, stage, host, replies
KNOWN = (
    # POP login.
    ('person', 'web browser', 'pop', 'pop.gmail.com', (
        '-ERR [AUTH] Web login required: '
        'https://support.google.com/mail/answer/78754',)),
    ('account', 'popcheckdelay', 'pop', 'pop.gmail.com', (
        '-ERR [AUTH] Account exceeded pop command or bandwidth limits '
        '(Failure)',)),
    ('person', 'popssl=true', 'pop', HOST, (
        '-ERR [AUTH] Authentication disallowed on non-secure (SSL/TLS) '
        'connections.',)),
    ('', 'another program', 'pop', HOST, (
        '-ERR [IN-USE] Mailbox is locked by another POP3 session.',
        '-ERR Unable to lock maildrop')),
    ('', 'popcheckdelay', 'pop', HOST, (
        '-ERR [LOGIN-DELAY] Minimum time between logins not met',)),
    ('', 'passes', 'pop', HOST, (
        '-ERR [SYS/TEMP] Internal error occurred. Refer to server log for '
        'more information.', "-ERR [SYS/TEMP] Couldn't sync mailbox.")),
    ('person', 'switch it on', 'pop', 'pop.gmail.com', (
        '-ERR [SYS/PERM] Your account is not enabled for POP access',)),
    ('person', 'TLS 1.2', 'pop', 'outlook.office365.com', (
        '-ERR TLS 1.0 and 1.1 are not supported. Please upgrade/update your '
        'client to support TLS 1.2. Visit https://aka.ms/popimap_tls',)),
    ('person', 'TLS 1.2', 'login', M365, (
        '421 4.7.66 TLS 1.0 and 1.1 are not supported. Please upgrade/update '
        'your client to support TLS 1.2. Visit '
        'https://aka.ms/smtp_auth_tls.',)),
    ('person', 'poppassword', 'pop', HOST, (
        '-ERR [AUTH] Authentication failed.',
        '-ERR [AUTH] Username and password not accepted.')),
    ('', 'poppassword', 'pop', HOST, (
        '-ERR authorization failed', '-ERR Invalid login or password')),

    # Login.
    ('person', 'apppasswords', 'login', GMAIL, (
        '535-5.7.8 Username and Password not accepted. For more\n'
        '535-5.7.8 information, go to\n535 5.7.8  '
        'https://support.google.com/mail/?p=BadCredentials a1-2 - gsmtp',
        '535-5.7.8 Username and\n535 5.7.8 Password not accepted.',
        '535 5.7.8 Username and 5.7.8 Password not accepted.',
        '534-5.7.9 Application-specific password required. For more '
        'information, go to\n534 5.7.9  '
        'https://support.google.com/mail/?p=InvalidSecondFactor')),
    ('person', 'Google doubts', 'login', GMAIL, (
        '534-5.7.14 <https://accounts.google.com/signin/continue> Please log '
        'in via your web browser and then try again.',)),
    ('person', 'Authenticated SMTP', 'login', M365, (
        '535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication '
        'is disabled for the Tenant. Visit https://aka.ms/smtp_auth_disabled '
        'for more information.',
        '535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication '
        'is disabled for the Mailbox.',
        '504 5.7.4 Unrecognized authentication type')),
    ('person', 'oauth=microsoft', 'login', M365, (
        '535 5.7.139 Authentication unsuccessful, basic authentication is '
        'disabled.',
        '550 5.7.30 Basic authentication is not supported for Client '
        'Submission.',
        '535 5.7.139 Authentication unsuccessful, user is locked by your '
        "organization's security defaults policy. Contact your "
        'administrator.')),
    ('person', 'Conditional Access', 'login', M365, (
        '535 5.7.139 Authentication unsuccessful, the request did not meet '
        'the criteria to be authenticated successfully. Contact your '
        'administrator.',)),
    ('person', 'locked', 'login', M365, (
        '535 5.7.139 Authentication unsuccessful, account locked.',)),
    ('person', 'closed', 'login', HOST, (
        '535 Authentication failed: account disabled',)),
    ('person', 'Exchange refuses', 'login', M365, (
        '535 5.7.3 Authentication unsuccessful [host.example.com]',
        '535 5.7.139 Authentication unsuccessful, the user credentials were '
        'incorrect.')),
    ('account', 'too many logins', 'login', GMAIL, (
        '454-4.7.0 Too many login attempts, please try again later.',)),
    ('person', 'wait an hour', 'login', YAHOO, (
        '535 5.7.0 (#AUTH005) Too many bad auth attempts.',)),
    ('person', 'another provider', 'login', AOL, (
        '535 5.7.0 (#MBR1212) Incorrect username or password',)),
    ('person', 'Yandex', 'login', YANDEX, (
        '535 5.7.8 Error: authentication failed: This user does not have '
        'access rights to this service',)),
    ('person', 'app password', 'login', MAILRU, (
        '535 5.7.0 NEOBHODIM parol prilozheniya https://example.com/ / '
        'Application password is REQUIRED',)),
    ('person', 'app password', 'login', 'smtp.fastmail.com', (
        '535 5.7.8 Error: authentication failed: ',)),
    ('person', 'SendGrid', 'login', SENDGRID, (
        '451 Authentication failed: Maximum credits exceeded',)),
    ('person', 'apikey', 'login', SENDGRID, (
        '535 Authentication failed: Bad username / password',)),
    ('person', 'AuthSMTP', 'login', 'mail.authsmtp.com', (
        '433 Message quota exceeded',)),
    ('person', 'listed addresses', 'login', BREVO, (
        '525 5.7.1 Unauthorized IP address',)),
    ('person', 'SMTP page', 'login', BREVO, (
        '535 5.7.8 Authentication failed',)),
    ('person', 'smtpusername', 'login', HOST, (
        '535 Incorrect authentication data',
        '535 5.7.8 Error: authentication failed: UGFzc3dvcmQ6',
        "550 5.7.0 Code d'authentification invalide OFR_305")),
    ('person', 'POP3 and IMAP', 'login', GMX, (
        '535 Authentication credentials invalid',)),
    ('', 'two minutes', 'login', SES, (
        '535 Authentication Credentials Invalid',)),
    ('person', 'account.apple.com', 'login', ICLOUD, (
        '535 5.7.8 Error: authentication failed: ',)),
    ('person', 'Kundencenter', 'login', 'securesmtp.t-online.de', (
        '535 5.7.8 Error: authentication failed: ',)),
    ('person', 'freenet', 'login', 'mx.freenet.de', (
        '535 Incorrect authentication data',)),
    ('person', 'region', 'login', ZOHO, ('535 Authentication Failed',)),
    ('person', 'weak', 'login', 'smtp.tiscali.it', (
        '535 5.7.0 your password is too simple',)),
    ('person', 'no login', 'login', HOST, (
        '503 5.5.1 Error: authentication not enabled',)),
    ('person', 'smtpout.secureserver.net', 'login', 'mail.secureserver.net', (
        '535 Authentication not allowed on IBSMTP Servers. IB401',)),
    ('', 'passes', 'login', HOST, (
        '454 4.7.0 Temporary authentication failure: Connection lost to '
        'authentication server',
        '435 Unable to authenticate at present')),
    ('person', 'smtpsecurity=tls', 'login', HOST, (
        '530 5.7.0 Must issue a STARTTLS command first',
        '530 5.7.7 Email sending without SSL/TLS encryption is not allowed.',
        '504 5.5.4 Encryption required for requested authentication '
        'mechanism',
        '538 5.7.11 Encryption required for requested authentication '
        'mechanism')),

    # Connection, greeting, our name, our line.
    ('', 'smtpport=587', 'connect', HOST, (
        'mail.example.com does not answer in time',
        'mail.example.com: Connection timed out')),
    ('', 'smtpport', 'connect', HOST, (
        'mail.example.com: Connection refused',)),
    ('', 'spelling', 'connect', HOST, (
        'the name mail.example.com is not known: Name or service not known',
    )),
    ('', 'mail.gmx.net', 'connect', 'mx00.gmx.net', (
        '554-gmx.net (mxgmx000) Nemesis ESMTP Service not available\n'
        '554-No SMTP service\n554-Bad DNS PTR resource record.',)),
    ('', 'securesmtp.t-online.de', 'connect', 'mx00.t-online.de', (
        '554 IP=192.0.2.1 - A problem occurred. (Ask your postmaster for '
        'help or to contact tosa@rx.t-online.de to clarify.)',)),
    ('later', 'block list', 'rcpt', HOST, (
        '554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked '
        'using zen.spamhaus.org; https://www.spamhaus.org/query/ip/192.0.2.1',
        '554 5.7.1 Client host [203.0.113.9] blocked using zen.spamhaus.org',
        '550 5.7.1 Service unavailable; client [192.0.2.1] blocked using '
        'zen.spamhaus.org',
        '554 5.7.1 <dyn-1.example.net[192.0.2.1]>: Client host rejected: '
        'dynamic address, use the server of your provider',
        '550-"JunkMail rejected - dyn-1.example.net (nas) [192.0.2.1]:41784 '
        'is in an RBL, see\n550 https://www.spamhaus.org/query/ip/192.0.2.1"',
        '554 host [192.0.2.1] is blacklisted by zen.spamhaus.org',
        '550 rejected because 192.0.2.1 is in a black list at '
        'zen.spamhaus.org')),
    ('later', 'block list', 'data', HOST, (
        '554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked '
        'using zen.spamhaus.org; https://www.spamhaus.org/query/ip/192.0.2.1',
        '554 5.7.1 Service unavailable; Client host [2001:db8::1] blocked '
        'using zen.spamhaus.org')),
    ('later', 'block list', 'mail', ICLOUD, (
        '550 5.7.1 Mail from IP 192.0.2.1 was rejected due to listing in '
        'Spamhaus PBL. For details please see https://www.spamhaus.org/',)),
    ('later', 'block list', 'mail', OUTLOOK_MX, (
        '550 5.7.1 Unfortunately, messages from [192.0.2.1] weren\'t sent. '
        'Please contact your Internet service provider since part of their '
        'network is on our block list (S3150).',
        '550 DY-001 (COL004-MC2F1) Unfortunately, messages from 192.0.2.1 '
        'weren\'t sent.',
        '550 5.7.606 Access denied, banned sending IP [192.0.2.1].')),
    ('later', 'block list', 'connect', 'mta5.am0.yahoodns.net', (
        "553 5.7.1 [BL21] Connections will not be accepted from 192.0.2.1, "
        "because the ip is in Spamhaus's list",
        '553 Mail from 192.0.2.1 not allowed - 5.7.1 [BL21] Connections not '
        'accepted from IP addresses on Spamhaus PBL',
        '521 5.7.1 Service unavailable; client [192.0.2.1] blocked using '
        'zen.spamhaus.org',
        '554 5.7.1 Dynamic IP, see PBL http://www.spamhaus.org/pbl',
        '554 Connection refused. 192.0.2.1 is on the Policy Block List '
        '(PBL). IB106')),
    ('person', 'proper name', 'rcpt', HOST, (
        '450 4.7.25 Client host rejected: cannot find your hostname, '
        '[192.0.2.1]',
        '450 4.7.1 Client host rejected: cannot find your reverse hostname, '
        '[192.0.2.1]')),
    ('person', 'proper name', 'connect', 'mail.secureserver.net', (
        '421 Temporarily rejected. Reverse DNS for this IP failed. IB108',)),
    ('', 'proper name', 'dot', GOOGLE_MX, (
        '550 5.7.25 [192.0.2.1] The IP address sending this message does not '
        'have a PTR record setup',)),
    ('person', 'smtp.gmail.com', 'rcpt', GOOGLE_MX, (
        '421 4.7.0 IP not in whitelist for RCPT domain, closing '
        'connection.',)),
    ('', 'private lines', 'dot', GOOGLE_MX, (
        "550-5.7.1 [192.0.2.1] The IP you're using to send mail is not "
        'authorized to\n550-5.7.1 send email directly to our servers. Please '
        'use the SMTP relay at your\n550 5.7.1 service provider instead.',)),
    ('person', 'localhostname', 'hello', RELAY, (
        '421 4.7.0 Try again later, closing connection. (EHLO) '
        'a1-2sm3.4 - gsmtp',
        '501-5.5.4 Empty HELO/EHLO argument not allowed, closing connection.',
        '501 5.5.4 HELO/EHLO argument nas_1 invalid, closing connection.')),
    ('person', 'localhostname', 'rcpt', HOST, (
        '504 5.5.2 <nas>: Helo command rejected: need fully-qualified '
        'hostname',
        '450 4.7.1 <nas.lan>: Helo command rejected: Host not found',
        '550 Access denied - Invalid HELO name (See RFC2821 4.1.1.1)')),
    ('person', 'localhostname', 'hello', HOST, (
        '501 Syntactically invalid EHLO argument(s)',)),
    ('', 'localhostname', 'hello', HOST, ('504 5.5.2 vm: not taken',)),
    ('', 'localhostname', 'rcpt', 'mail.protonmail.ch', (
        '550 5.5.1 Protocol error',)),

    # The server wants TLS or a login.
    ('person', 'smtpsecurity=tls', 'mail', HOST, (
        '530 5.7.0 Must issue a STARTTLS command first.',
        '451 5.7.3 STARTTLS is required to send mail [host.example.com]',
        '530 5.7.0 TLS required.')),
    ('person', 'smtpsecurity=tls', 'rcpt', HOST, (
        '450 4.7.1 Session encryption is required',)),
    ('person', 'smtpusername', 'mail', GMAIL, (
        '530-5.7.0 Authentication Required. For more information, go to\n'
        '530 5.7.0 https://support.google.com/mail/?p=WantAuthError',
        '530 5.5.1 Authentication Required.',
        '530 5.7.57 Client not authenticated to send mail. Error: 535 5.7.3 '
        'Authentication unsuccessful',
        '550 5.7.57 Client was not authenticated to send anonymous mail '
        'during MAIL FROM',
        '550 Unauthenticated senders not allowed')),
    ('person', 'smtpusername', 'rcpt', HOST, (
        '553 5.7.1 <a@example.com>: Sender address rejected: not logged in',
        '550 must be authenticated',
        '550 Relay access denied - please authenticate')),
    ('person', 'connector', 'rcpt', OUTLOOK_MX, (
        '550 5.7.64 TenantAttribution; Relay Access Denied '
        '[host.example.com]',)),
    ('person', 'Google Workspace', 'mail', RELAY, (
        '550 5.7.0 Mail relay denied [192.0.2.1]. Invalid credentials for '
        'relay for one of the domains in: example.com',
        '550 5.7.1 Invalid credentials for relay [192.0.2.1]')),
    ('later', 'popbeforesmtp=true', 'rcpt', HOST, (
        '550 5.7.1 You must check for new mail before sending mail',
        'Relaying Denied: Authenticate with POP first',
        '550 sorry, you must get POP/APOP authorization.')),
    ('', 'strangers', 'rcpt', HOST, (
        '554 5.7.1 <r@example.org>: Relay access denied',
        '454 4.7.1 <r@example.org>: Relay access denied',
        '550 relay not permitted',
        '550-example.net [192.0.2.1] is not permitted to relay through this '
        'server without authentication.',
        '550-Please turn on SMTP Authentication in your mail client, or '
        'login to the\n550-IMAP/POP3 server before sending your message.',
        "553 sorry, that domain isn't in my list of allowed rcpthosts "
        '(#5.7.1)',
        '550 5.7.54 SMTP; Unable to relay recipient in non-accepted domain',
        '550 5.7.1 Unable to relay',
        '513 5.7.1 Relaying denied.',
        '550 relaying denied for <r@example.org>')),

    # Limits of the account, pace.
    ('account', 'daily', 'mail', GMAIL, (
        '550-5.4.5 Daily user sending limit exceeded. For more information',
        '550 5.4.5 Daily user sending limit exceeded.')),
    ('account', 'daily', 'rcpt', RELAY, (
        '550 5.4.5 Daily SMTP relay limit exceeded for user',
        '550 5.7.1 Daily SMTP relay limit exceeded for customer')),
    ('account', 'smtprate', 'rcpt', RELAY, (
        '450 4.2.1 Peak SMTP relay limit exceeded for customer',)),
    ('account', 'daily', 'dot', ICLOUD, (
        '550 5.7.1 u@example.com: You have exceeded your daily sending '
        'limit. Please try again later.',
        '462 Daily send limit reached. Please try again tomorrow')),
    ('account', 'smtprate', 'rcpt', HOST, (
        '554 5.7.0 The limit on the number of allowed outgoing messages was '
        'exceeded. Try again later.',
        '450-Requested mail action not taken: mailbox unavailable\n'
        '450 Mail send limit exceeded.',
        '550 Domain example.com has exceeded the max emails per hour '
        '(100/100 (100%)) allowed. Message discarded.',
        '550 5.7.1 Your mail limit has been reached.',
        '451 4.7.1 Ratelimit "hostinger_out_ratelimit" exceeded',
        '450 ratelimit exceeded')),
    ('account', 'smtprate', 'dot', MAILRU, (
        '451 Ratelimit exceeded for mailbox u@example.com. Try again '
        'later.',)),
    ('account', 'smtprate', 'rcpt', GODADDY, (
        '550 User u@example.com has exceeded its 24-hour sending limit. '
        'Messages to 250 recipients out of 250 allowed have been sent. Relay '
        'quota will reset in 21.99 hours.',
        '550 This IP has sent too many messages this hour. IB504')),
    ('account', 'smtprate', 'dot', HOST, (
        '550 5.7.0 Sending limit exceeded for your IP address',)),
    ('account', 'smtprate', 'connect', HOST, (
        '554 5.7.1 Connection limit exceeded',
        '550 Too many mails today, try again later')),
    ('account', 'smtprate', 'dot', MAILGUN, (
        '421 Domain example.com is not allowed to send: You are sending too '
        'fast. Your account is on probation',
        '421 Domain example.com is not allowed to send: recipient limit '
        'exceeded')),
    ('account', 'failed in an hour', 'rcpt', HOST, (
        'Domain example.com has exceeded the max defers and failures per '
        'hour (5/5 (100%)) allowed. Message discarded.',)),
    ('account', '10000', 'dot', M365, (
        '554 5.2.0 STOREDRV.Submission.Exception:'
        'SubmissionQuotaExceededException; Failed to process message',
        "554 5.2.0 The message can't be submitted because the sender's "
        'submission quota was exceeded.')),
    ('account', 'Sent Items', 'dot', M365, (
        '554 5.2.2 mailbox full; STOREDRV.Submission.Exception:'
        'QuotaExceededException.MapiExceptionShutoffQuotaExceeded; Failed '
        'to process message',)),
    ('account', 'daily', 'dot', SES, (
        '454 Throttling failure: Daily message quota exceeded',)),
    ('later', 'smtprate', 'dot', SES, (
        '454 Throttling failure: Maximum sending rate exceeded',)),
    ('later', 'smtprate', 'data', 'live.smtp.mailtrap.io', (
        '550 5.7.0 Too many emails per second. Please upgrade your plan',)),
    ('later', 'smtprate', 'mail', GODADDY, (
        '550 You have sent the max number of messages per session. Open a '
        'new session and try again. IB510',)),
    ('', 'smtpconnections=1', 'connect', HOST, (
        '421 4.7.0 mail.example.com Error: too many connections from '
        '[192.0.2.1]',
        '421 4.3.2 The maximum number of concurrent server connections has '
        'exceeded a limit, closing transmission channel')),
    ('', 'smtpconnections=1', 'dot', M365, (
        '432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded',
        '432 4.3.2 Concurrent connection limit exceeded')),
    ('', 'smtprate', 'mail', HOST, (
        '421 4.4.2 Message submission rate for this client has exceeded the '
        'configured limit',
        '450 4.7.1 Error: too much mail from [192.0.2.1]')),
    ('', 'Message-ID', 'dot', GMAIL, (
        '421 4.7.28 Gmail has detected this message exceeded its quota for '
        'sending messages with the same Message-ID:',)),

    # The account may not send.
    ('person', 'confirm', 'dot', OUTLOOK, (
        '550 5.3.4 Requested action not taken; To continue sending messages, '
        'please sign in to your account.',)),
    ('person', 'Restricted', 'dot', M365, (
        '550 5.1.8 Access denied, bad outbound sender',
        '550 5.7.705 Access denied, tenant has exceeded threshold',
        '550 5.7.708 Access denied, traffic not accepted from this IP',
        '550 5.7.750 Client blocked from sending from unregistered domain',
        '550 5.7.501 Access denied, spam abuse detected')),
    ('', 'for spam', 'dot', OUTLOOK, (
        '554 5.2.0 STOREDRV.Submission.Exception:OutboundSpamException; '
        'Failed to process message due to a permanent exception with message '
        'WASCL UserAction verdict is not None.',)),
    ('person', 'licence', 'dot', M365, (
        '550 5.2.253 throttled after repeated licence errors',)),
    ('person', 'Mail.ru', 'dot', MAILRU, (
        '550 Message was not accepted -- invalid mailbox. Local mailbox '
        'u@example.com is unavailable: message sending for this account is '
        'disabled',)),
    ('person', 'paused', 'dot', SES, (
        '554 Message rejected: Sending paused for this account. For more '
        'information, please check the inbox of the email address associated '
        'with your AWS account.',)),
    ('person', 'IAM', 'dot', SES, (
        '554 Access denied: User arn:aws:iam::1:user/x is not authorized to '
        'perform ses:SendRawEmail on resource',
        '554 Access denied: User `arn:aws:iam::1:user/x` is not authorized '
        "to perform `ses:SendRawEmail' on resource")),
    ('person', 'sandbox', 'data', MAILGUN, (
        '421 Domain sandbox1.mailgun.org is not allowed to send: Sandbox '
        'subdomains are for test purposes only. Please add your own domain',
        '421 Domain example.com is not allowed to send: Account disabled')),
    ('person', 'activated', 'mail', BREVO, (
        '502 5.7.0 Your SMTP account is not yet activated',)),
    ('person', 'panel', 'mail', SMTP2GO, (
        "550 that SMTP username's account is not allowed to send",
        '550 that IP address is not allowed to send')),
    ('person', 'Zoho', 'dot', ZOHO, (
        '550 5.4.6 Unusual sending activity detected. Please try after '
        'sometime. To unblock ... Click here.',
        '554 5.1.8 Email Outgoing Blocked')),
    ('person', 'host', 'rcpt', HOST, (
        '550 Domain example.com has an outgoing mail suspension. Message '
        'discarded.',)),

    # The sender's address.
    ('never', 'forcefrom', 'mail', '127.0.0.1', (
        '451 4.0.0 backend: invalid return path: not owned by user',)),
    ('never', 'SendGrid', 'dot', SENDGRID, (
        '403 You are not authorized to send from that email address',)),
    ('', 'verified', 'dot', SENDGRID, (
        '550 The from address does not match a verified Sender Identity. '
        'Mail cannot be sent until this error is resolved.',
        '554 Message rejected: Email address is not verified. The following '
        'identities failed the check in region EU-WEST-1: a@example.com',
        '550 From header sender domain not verified',
        '550 The example.com domain is not verified. Please, add and verify '
        'your domain',
        '501 from domain not trusted',
        '553 From: address not verified; see http://help.yahoo.com/')),
    ('', 'forcefrom', 'mail', HOST, (
        '550 5.7.0 From address is not one of your addresses',
        '550-Requested action not taken: mailbox unavailable\n'
        '550 Sender address is not allowed.',
        '553 5.7.1 Sender address rejected: not owned by auth user.',
        '5.5.3 Mail from not owned by user. LPN105_421',
        '501 5.1.0 Emetteur invalide. Invalid Sender. OFR004_405 [405]',
        '550 not local sender over smtp',
        '553 Mail from must equal authorized user',
        '501 mail from address must be same as authorization user',
        '550 5.7.60 SMTP; Client does not have permissions to send as this '
        'sender',
        '550 5.7.1 Client does not have permissions to send as this sender',
        '550 "envelope sender not allowed"',
        '550 From domain must match authenticated domain',
        'You are not allowed to use the domain example.com as a sender '
        'domain.',
        '550 5.1.0 <a@example.com> sender rejected',
        '550 <a@example.com> Blank From: addresses are not allowed. Provide '
        'a valid From. IB501')),
    ('', 'forcefrom', 'rcpt', HOST, (
        '553 5.7.1 <a@example.com>: Sender address rejected: not owned by '
        'user b@example.com',)),
    ('', 'forcefrom', 'dot', 'smtp.fastmail.com', (
        '551 5.7.1 Not authorised to send from this header address',
        '550 5.7.0 Sender or From header address rejected: not owned by '
        'authorized user',
        '553 Relaying disallowed as a@example.com',
        '554 5.2.252 SendAsDenied; a@example.com not allowed to send as '
        'b@example.com; STOREDRV.Submission.Exception:SendAsDeniedException',
    )),
    ('', 'forcefrom', 'dot', YAHOO, (
        '550 Request failed; Mailbox unavailable',)),
    ('', 'login here', 'rcpt', HOST, (
        '554 5.7.1 <a@example.com>: Sender address rejected: Access denied',
    )),
    ('', 'take @ and dots', 'dot', IONOS, (
        '554 Unauthorized sender address',)),
    ('never', 'your network only', 'rcpt', HOST, (
        '450 4.1.8 <a@example.lan>: Sender address rejected: Domain not '
        'found',
        '450 4.1.8 <root@nas>: Sender address rejected: Domain not found')),
    ('', 'does not exist', 'rcpt', HOST, (
        '550 5.1.8 <a@example.lan>: Sender address rejected: Domain not '
        'found',
        '450 4.1.8 <a@example.com>: Sender address rejected: Domain not '
        'found',
        '550-Verification failed for <a@nas>\n550-Unrouteable address\n'
        '550 Sender verify failed')),
    ('', 'no mail address', 'mail', HOST, (
        '553 5.1.7 The sender address <root> is not a valid RFC 5321 '
        'address.',
        '501 5.1.7 Bad sender address syntax',
        '501 root: sender address must contain a domain')),
    ('', 'DMARC', 'dot', GOOGLE_MX, (
        '550-5.7.26 Unauthenticated email from example.com is not accepted '
        "due to domain's DMARC policy.",
        '550 5.7.26 This mail has been blocked because the sender is '
        'unauthenticated',
        '421 4.7.26 This mail has been rate limited because it is '
        'unauthenticated.',
        '550 5.7.515 Access denied, sending domain EXAMPLE.COM does not meet '
        'the required authentication level. 5322.From',
        '550 5.7.509 Access denied, sending domain [example.com] does not '
        'pass DMARC verification',
        "554 5.7.1 Your message was rejected due to example.com's DMARC "
        'policy.',
        '550 5.7.23 The message was rejected because of Sender Policy '
        'Framework violation',
        '550 <a@example.com>: Reject due to SPF policy.',
        '550-SPF-check failed',
        '550 5.7.1 [CS01] Message rejected due to local policy.')),

    # Passes by itself.
    ('', 'some minutes', 'rcpt', HOST, (
        '450 4.2.0 <r@example.org>: Recipient address rejected: Greylisted',
        '451 4.7.1 Greylisting in action, please come back later',
        '4.7.1 Docking request denied, first time visit, you have been '
        'greylisted, try again later',
        '450 4.1.1 <r@example.org>: Recipient address rejected: unverified '
        'address: Address verification in progress')),
    ('later', 'passes', 'rcpt', GMX, (
        '550-Requested action not taken: mailbox unavailable\n'
        '550 Failure sending mail. Try again later',)),
    ('later', 'passes', 'mail', ORANGE, (
        '550 mwinf5c04 ME Service refuse. Veuillez essayer plus tard. '
        'Service refused, please try later. OFR006_103 [103]',
        '550 5.5.0 Service refuse. LPN005_510')),
    ('later', 'recipient', 'dot', M365, (
        '554 5.2.121 The sender has exceeded the limit for the number of '
        'messages they can send to this recipient per hour.',
        '554 5.2.122 The recipient has exceeded their limit for the number '
        'of messages they can receive per hour')),
    ('later', 'recipient', 'rcpt', GMAIL, (
        '550 5.2.1 The user you are trying to contact is receiving mail at a '
        'rate that prevents additional messages from being delivered.',)),
    ('', 'recipient', 'rcpt', GMAIL, (
        '450 4.2.1 The user you are trying to contact is receiving mail at a '
        'rate that prevents additional messages from being delivered.',)),
    ('', 'passes', 'dot', HOST, (
        '452 4.3.1 Insufficient system resources',
        '452 Space shortage, please try later',
        '451 4.3.0 Temporary lookup error',
        '451 Temporary local problem - please try later',
        '451 4.7.500 Server busy. Please try again later from [192.0.2.1]. '
        '(AS77712344)',
        '451 4.7.650 The mail server [192.0.2.1] has been temporarily rate '
        'limited due to IP reputation.',
        '454 4.7.0 TLS not available due to local problem')),

    # The mail itself.
    ('never', 'line ends', 'dot', HOST, (
        '451 See http://pobox.com/~djb/docs/smtplf.html.',)),
    ('', 'line ends', 'dot', HOST, (
        '550 5.5.2 host Error: bare <LF> received',
        '550 5.6.11 Message contains bare linefeeds',
        '552 Message header not CRLF terminated')),
    ('', '998', 'dot', HOST, (
        '550 maximum allowed line length is 998 octets, got 1024',
        '501 Syntax error - line too long')),
    ('', 'resolution', 'mail', HOST, (
        '552 5.3.4 Message size exceeds fixed maximum message size',
        "552 5.3.4 Your message exceeded Google's message size limits. "
        '?p=MaxSizeError',
        '552 Message size exceeds maximum permitted')),
    ('', 'resolution', 'mail', HOST, (
        '552 5.3.4 Message exceeded the maximum limit',)),
    ('', 'attachment', 'dot', GMAIL, (
        '552 5.7.0 This message was blocked because its content presents a '
        'potential security issue. ?p=BlockedMessage',
        '552 5.7.0 Our system detected an illegal attachment on your '
        'message.',
        '554 5.7.0 Reject, id=17352-01 - BANNED: .exe,.exe-ms',
        '550 5.7.1 Refused by local policy. No SPAM please! (B-ATTACH)')),
    ('', 'header', 'dot', HOST, (
        '550-5.7.1 [192.0.2.1] Messages missing a valid Message-ID: header '
        'are not\n550 5.7.1 accepted.',
        '550 5.7.1 This message is not RFC 5322 compliant, the issue is: '
        'duplicate headers. ?p=RfcMessageNonCompliant',
        '550 5.7.1 multiple addresses in From: header are not accepted.',
        "554 Transaction failed: Duplicate header 'DKIM-Signature'.",
        '554-Transaction failed\n554-Reject due to policy restrictions.\n'
        '554 For explanation visit https://postmaster.gmx.net/en/'
        'error-messages?ip=192.0.2.1&c=hi',
        '550 5.7.512 Access denied, message must be RFC 5322 section 3.6.2 '
        'compliant',
        '552 A message header line is too long',
        '552 Message header is ridiculously long',
        '550 header syntax',
        '554 Message not allowed - Headers are not RFC compliant[291]',
        '554 5.7.0 Reject, id=17352-01 - BAD_HEADER')),
    ('', 'spam', 'dot', HOST, (
        '550-5.7.1 Our system has detected that this message is likely '
        'unsolicited mail. ?p=UnsolicitedMessageError',
        '550 spam message rejected. Please visit http://help.mail.ru/',
        '550 5.2.0 Mail rejete. Mail rejected. ofr_506 [506]',
        '550 message has been rejected due to spam or virus classification',
        '550 5.7.1 Refused by local policy. No SPAM please! (B-URL)',
        '554 5.7.0 Reject, id=17352-01 - spam',
        '554 Message not allowed - [299]',
        '554 5.7.9 Message not accepted for policy reasons.')),
    ('', '24 hours', 'dot', YANDEX, (
        '554 5.7.1 [1] Message rejected under suspicion of SPAM; '
        'https://ya.cc/1IrBc',)),
    ('', 'round in a loop', 'dot', HOST, (
        '554 5.4.6 Message exceeded 50 hops',
        '550 Too many "Received" headers - suspected mail loop',
        '554 5.4.6 Routing loop detected')),
    ('', 'ASCII', 'rcpt', HOST, (
        '553 5.6.7 Must declare SMTPUTF8 to send unicode address',
        '533 no support for internationalised mailbox name')),

    # Sign-in by OAuth2.
    ('', '90 days', 'token', AADSTS, (
        'invalid_grant: AADSTS700082: The refresh token has expired due to '
        'inactivity.', 'invalid_grant: AADSTS70008: The provided '
        'authorization code or refresh token is expired.')),
    ('', 'new password', 'token', AADSTS, (
        'invalid_grant: AADSTS50173: The provided grant has expired due to '
        'it being revoked',)),
    ('', 'frequency', 'token', AADSTS, (
        'invalid_grant: AADSTS70043: The refresh token has expired or is '
        'invalid due to sign-in frequency checks by conditional access.',)),
    ('', 'second factor', 'token', AADSTS, (
        'interaction_required: AADSTS50076: Due to a configuration change '
        'made by your administrator, you must use multi-factor '
        'authentication',)),
    ('', 'oauthflow=browser', 'token', AADSTS, (
        'access_denied: AADSTS53003: Access has been blocked by Conditional '
        'Access policies.',)),
    ('', 'SMTP.Send', 'token', AADSTS, (
        'invalid_grant: AADSTS65001: The user or administrator has not '
        'consented to use the application',
        'consent_required: AADSTS90094: The grant requires admin '
        'permission.')),
    ('', 'oauthclientid', 'token', AADSTS, (
        "unauthorized_client: AADSTS700016: Application with identifier 'x' "
        'was not found in the directory',)),
    ('', 'oauthtenant', 'token', AADSTS, (
        "invalid_request: AADSTS90002: Tenant 'x' not found.",)),
    ('', 'public client flows', 'token', AADSTS, (
        "invalid_client: AADSTS7000218: The request body must contain the "
        "following parameter: 'client_assertion' or 'client_secret'.",)),
    ('', 'remove oauthclientsecret', 'token', AADSTS, (
        "invalid_client: AADSTS700025: Client is public so neither "
        "'client_assertion' nor 'client_secret' should be presented.",)),
    ('', 'not its id', 'token', AADSTS, (
        'invalid_client: AADSTS7000215: Invalid client secret provided.',)),
    ('', 'expired', 'token', AADSTS, (
        'invalid_client: AADSTS7000222: The provided client secret keys for '
        "app 'x' are expired.",)),
    ('', 'one organization', 'token', AADSTS, (
        "invalid_request: AADSTS50194: Application 'x' is not configured as "
        'a multi-tenant application.',)),
    ('', 'consumers', 'token', AADSTS, (
        'invalid_request: AADSTS9002332: Application is configured for use '
        'by Azure Active Directory users only.',)),
    ('', 'too late', 'token', AADSTS, (
        'expired_token: AADSTS70019: Verification code expired.',
        'bad_verification_code')),
    ('', 'passes', 'token', AADSTS, (
        'temporarily_unavailable', 'server_error',
        'invalid_request: AADSTS90033: A transient error has occurred.')),
    ('', 'oauthflow=browser', 'token', GOOGLE_TOKEN, (
        'invalid_scope: Invalid device flow scope: '
        'https://mail.google.com/',)),
    ('', 'administrator', 'token', GOOGLE_TOKEN, ('admin_policy_enforced',)),
    ('', 'session control', 'token', GOOGLE_TOKEN, (
        'invalid_grant: reauth related error (invalid_rapt)',)),
    ('', 'Testing', 'token', GOOGLE_TOKEN, (
        'invalid_grant: Token has been expired or revoked.',
        'invalid_grant: Bad Request')),
    ('', '--login', 'token', 'login.example.org', ('invalid_grant',)),
    ('', 'oauthclientsecret', 'token', GOOGLE_TOKEN, (
        'invalid_client', 'deleted_client')),
    ('', 'oauthflow', 'token', 'login.example.org', ('unauthorized_client',)),
    ('', 'oauthscope', 'token', 'login.example.org', ('invalid_scope',)),
    ('', 'refused', 'token', AADSTS, (
        'access_denied', 'authorization_declined')),

    # The recipient.
    ('', 'recipient', 'rcpt', HOST, (
        '503 5.1.3 Bad recipient address syntax',
        '501 5.1.3 Bad recipient address syntax',
        '553 5.1.3 The recipient address <x> is not a valid RFC-5321 '
        'address.')),
)

# Of the recipient, or of his side: never taken for ours.
RECIPIENT = (
    '550-5.1.1 The email account that you tried to reach does not exist. '
    "Please try\n550-5.1.1 double-checking the recipient's email address",
    '550 5.1.1 <r@example.org>: Recipient address rejected: User unknown in '
    'virtual mailbox table',
    '550 5.1.1 <r@example.org>: Recipient address rejected: User unknown in '
    'relay recipient table',
    '550 5.4.1 [r@example.org]: Recipient address rejected: Access denied. '
    '[host.example.com]',
    '550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP '
    'address lookup',
    '550-Requested action not taken: mailbox unavailable\n'
    '550 Requested action not taken: mailbox unavailable',
    '550 Requested action not taken: mailbox unavailable',
    '550 5.5.0 Requested action not taken: mailbox unavailable',
    '550 No such recipient here', '550 No such user',
    "554 delivery error: dd This user doesn't have a yahoo.com account",
    "550 5.1.1 Adresse d au moins un destinataire invalide. Invalid "
    'recipient. OFR_416 [416]',
    '550 5.2.1 The email account that you tried to reach is disabled. '
    'https://support.google.com/mail/?p=DisabledUser',
    '550 5.2.1 <r@example.org>: mailbox is inactive',
    "452-4.2.2 The recipient's inbox is out of storage space. "
    '?p=OverQuotaTemp',
    '552-5.2.2 The email account that you tried to reach is over quota and '
    'inactive. ?p=OverQuotaPerm',
    '552 5.2.2 <r@icloud.com>: user is over quota',
    '554 5.2.2 mailbox full',
    '552 5.2.2 Mailbox size limit exceeded',
    '552 Requested mail action aborted: exceeded storage allocation Quota '
    'exceeded.',
    '552 5.1.1 Boite du destinataire pleine. OFR_417', '550 Quota Exceeded',
    '556 5.1.10 <r@example.org>: Recipient address rejected: Domain '
    'example.org does not accept mail (nullMX)',
    '550 5.7.133 RESOLVER.RST.SenderNotAuthenticatedForGroup; '
    'authentication required',
    '550 5.7.134 Sender not authenticated for mailbox',
    '550 5.1.6 recipient no longer on server: r@icloud.com',
    '550 5.7.1 <r@example.org>: Recipient address rejected: Access denied',
    '550 5.7.1 Message rejected by the policy of the recipient',
    '550 5.7.1 RESOLVER.RST.NotAuthorized; not authorized to send to this '
    'recipient',
    '550 5.7.1 <pbl@example.org>: Recipient address rejected: blocked',
    '550 5.7.0 <r@example.org>: recipient limit exceeded, try again later',
    '550 5.4.1 <r@example.org>: Recipient address rejected: try again later',
    '550 5.7.0 <limits@example.org>: message limit for this address exceeded',
    '550 5.4.1 <r@example.org>: delivery rate limit for this address exceeded',
    '554 5.4.4 quota limit of that inbox exceeded',
    '550 5.4.1 delivery rate limit for this address exceeded',
    '550 5.4.6 Hop limit exceeded', '554 5.4.14 Hop count exceeded',
    '452 4.5.3 Error: too many recipients', '554 Too many recipients',
    '552 5.3.4 Message size limit exceeded',
    '550 5.1.1 <try.again.later@example.org>: User unknown',
    '550 5.1.1 <ratelimit@example.org>: User unknown',
    '554 5.7.1 Service unavailable; Sender address [a@example.com] blocked '
    'using dbl.spamhaus.org; https://www.spamhaus.org/query/dbl',
    '554 5.7.1 Service unavailable; Helo command [nas.example.com] blocked '
    'using dbl.spamhaus.org',
    '554 5.7.1 Service unavailable; Recipient address [r@example.org] blocked '
    'using dbl.example.net',
    '554 5.7.1 <r@example.org>: Recipient address rejected: dynamic alias, '
    'blocked using our list',
    '550 5.7.1 <dynamic-ip@pbl.example.org>: Recipient address rejected',
    '550 5.1.1 <client@example.org>: mailbox [client] blocked using a rule',
    '554 5.7.1 <dyn-1.example.net[192.0.2.1]>: Client host rejected: Access '
    'denied',
    '550 5.7.1 mail from a@example.com was rejected due to listing in a list',
    '554 5.7.1 Service unavailable; Unverified Client host blocked using '
    'our list',
    '554 5.7.1 The message holds a link that is on a block list (PBL)',
    '550 5.1.10.5 odd', '550 5.2.25 odd', '554 5.2.1234 odd',
    # What his server has said to the one that we talk to.
    *('%s <r@example.org>: Recipient address rejected: %s address: host '
      'mx.example.org[203.0.113.5] %s (in reply to RCPT TO command)' % words
      for words in (
          ('550 5.1.1', 'undeliverable', 'said: 504 5.5.2 <relay.example.net>:'
           ' Helo command rejected: need fully-qualified hostname'),
          ('550 5.1.1', 'undeliverable', 'said: 554 5.7.1 Service unavailable;'
           ' Client host [198.51.100.7] blocked using zen.spamhaus.org'),
          ('550 5.1.1', 'undeliverable', 'said: 552 5.2.2 u@example.org has '
           'exceeded its 24-hour sending limit'),
          ('450 4.1.1', 'unverified', 'said: 450 4.7.1 Client host rejected: '
           'cannot find your reverse hostname, [198.51.100.7]'),
          ('550 5.1.1', 'undeliverable', 'refused to talk to me: 550 5.7.1 '
           'Service unavailable; client [198.51.100.7] blocked using zen'))),
    '550-Callback setup failed while verifying <a@example.com>\n'
    '550-Called:   203.0.113.5\n550-Sent:     MAIL FROM:<>\n'
    '550-Response: 550 Access denied - Invalid HELO name\n'
    '550 Sender verify failed',
    '250 2.0.0 Ok: queued', '450 4.2.1 mailbox busy', '550 no',
    '550 5.7.1 unknown reason', '554 5.7.1 rejected',
    '550 authors and populations are limited',
)

HOSTS = (HOST, '127.0.0.1', GMAIL, M365, OUTLOOK, YAHOO, ICLOUD, GMX, WEBDE,
         IONOS, YANDEX, MAILRU, ZOHO, SES, SENDGRID, MAILGUN, SMTP2GO,
         GODADDY, ORANGE, 'securesmtp.t-online.de', 'smtp.strato.de')


def known():
    for kind, word, stage, host, replies in KNOWN:
        for reply in replies:
            yield kind, word, stage, host, reply


class Advice(unittest.TestCase):

    def test_a_known_reply_gets_its_kind_and_what_to_do(self):
        for kind, word, stage, host, reply in known():
            with self.subTest(reply, stage=stage, host=host):
                advice = smtpproxy.advise(host, stage, reply)

                self.assertEqual(kind, advice.kind, advice.sentence)
                self.assertIn(word, advice.sentence)

    def test_a_reply_in_one_line_means_the_same(self):
        for _, _, stage, host, reply in known():
            with self.subTest(reply):
                lines = re.sub(r'\n\d{3}[ -]', ' ', reply)
                one_line = re.sub(r'^(\d{3})-', r'\1 ', lines)

                self.assertIs(smtpproxy.advise(host, stage, reply),
                              smtpproxy.advise(host, stage, one_line))

    def test_a_recipients_refusal_is_never_taken_for_ours(self):
        for reply in RECIPIENT:
            for stage in 'rcpt', 'data', 'dot':
                for host in HOSTS:
                    with self.subTest(reply, stage=stage, host=host):
                        advice = smtpproxy.advise(host, stage, reply)

                        self.assertEqual('', advice.kind, advice.sentence)

    def test_a_refused_recipient_is_not_blamed_on_the_account(self):
        """His address or mailbox, or nothing is said."""
        for reply in RECIPIENT[:25]:
            with self.subTest(reply):
                advice = smtpproxy.advise(HOST, 'rcpt', reply)

                self.assertRegex(advice.sentence, '^$|recipient')

    def test_a_full_mailbox_is_told_from_a_wrong_address(self):
        for reply in ('552 5.1.1 Boite du destinataire pleine. OFR_417',
                      '552 5.2.2 <r@icloud.com>: user is over quota'):
            with self.subTest(reply):
                self.assertEqual(
                    smtpproxy.FULL_RECIPIENT,
                    smtpproxy.advise(HOST, 'rcpt', reply).sentence)

    def test_the_place_of_an_enhanced_code_counts(self):
        for reply in ('550 Client host [5.4.5.9] said 5.4.5 daily',
                      '550 5.4.55 daily', '550 (#5.4.5) daily'):
            with self.subTest(reply):
                self.assertEqual(
                    '', smtpproxy.advise(GMAIL, 'rcpt', reply).kind)

    def test_the_stage_tells_whose_mailbox_is_full(self):
        reply = '554 5.2.2 mailbox full; STOREDRV.Submission.Exception:' \
            'QuotaExceededException'

        self.assertEqual('account', smtpproxy.advise(M365, 'dot', reply).kind)
        self.assertEqual('', smtpproxy.advise(M365, 'rcpt', reply).kind)

    def test_the_host_tells_what_a_refused_login_means(self):
        reply = '535 Authentication failed'
        sentences = {smtpproxy.advise(host, 'login', reply).sentence
                     for host in (HOST, GMX, ICLOUD, YAHOO, SES, ZOHO,
                                  SENDGRID, 'securesmtp.t-online.de')}

        self.assertEqual(8, len(sentences))

    def test_a_neighbours_name_is_not_the_host(self):
        for host in 'smtp.gmail.com', 'smtp.fastmail.com', 'hotmail.com':
            with self.subTest(host):
                advice = smtpproxy.advise(host, 'login', '535 no')

                self.assertNotIn('POP3', advice.sentence)

    def test_an_unknown_reply_gets_no_advice(self):
        for stage in 'connect tls hello mail rcpt data dot token'.split():
            with self.subTest(stage):
                self.assertIs(smtpproxy.NO_ADVICE, smtpproxy.advise(
                    HOST, stage, '550 5.9.9 the moon is full'))

    def test_advice_stands_behind_the_problem(self):
        advice = smtpproxy.Advice(sentence='set smtprate')

        self.assertEqual('550 no; advice: set smtprate',
                         smtpproxy.with_advice('550 no', advice))
        self.assertEqual('550 no', smtpproxy.with_advice(
            '550 no', smtpproxy.NO_ADVICE))

    def test_only_the_beginning_of_an_endless_reply_is_read(self):
        reply = '550 ' + 'limit ' * 9999 + 'exceeded'

        self.assertLessEqual(len(smtpproxy.flattened(reply)), 2000)
        self.assertEqual('', smtpproxy.advise(HOST, 'mail', reply).kind)


class Failures(unittest.TestCase):
    """Where a problem's text is made."""

    def test_an_account_out_of_order_is_told_what_to_do(self):
        for stage, error, kind, word in (
                ('connect', socket.timeout('timed out'), '', 'port 25'),
                ('connect', ConnectionRefusedError(111, 'Connection refused'),
                 '', 'no mail server listens'),
                ('connect', smtplib.SMTPConnectError(554, b'5.7.1 Client host '
                 b'[192.0.2.1] blocked using pbl'), 'later', 'block list'),
                ('hello', OSError('504 5.5.2 <vm>: need a full name'), '',
                 'localhostname'),
                ('pop', poplib.error_proto(b'-ERR [AUTH] no'), 'person',
                 'popusername'),
                ('mail', smtps.ServiceUnavailable('mail', 'greylisted'), '',
                 'this passes')):
            with self.subTest(stage, error=error):
                trouble = smtpproxy.unavailable(stage, error, HOST, 25)

                self.assertEqual(kind, trouble.advice.kind)
                self.assertRegex(str(trouble), '; advice: .*' + word)

    def weighed(self, stage, code, text):
        report = smtps.Report(['a@b'])
        report.settle('a@b', code, text, stage)
        trouble = smtpproxy.weigh(report, HOST)
        return list(report.later), list(report.never), trouble

    def test_each_recipient_is_where_the_advice_puts_it(self):
        for stage, code, text, later, limit in (
                ('rcpt', 550, '5.1.1 user unknown', False, False),
                ('rcpt', 451, '4.3.0 whatever', True, False),
                ('rcpt', 554, '5.7.1 Client host [1.2.3.4] blocked using x',
                 True, False),
                ('mail', 451, 'invalid return path: not owned by user', False,
                 False),
                ('data', 550, '5.4.5 Daily user sending limit exceeded', True,
                 True),
                ('rcpt', 550, '5.1.8 bad outbound sender', True, True),
                ('', 550, '5.4.5 Daily user sending limit exceeded', False,
                 False)):
            with self.subTest(stage, text=text):
                waits, refused, trouble = self.weighed(stage, code, text)

                self.assertEqual(later, bool(waits))
                self.assertEqual(not later, bool(refused))
                self.assertEqual(limit, trouble is not None)

    def test_a_refused_recipient_is_no_limit_of_ours(self):
        for reply in RECIPIENT:
            with self.subTest(reply):
                code, text = re.match(r'(\d+)[- ](.*)', reply, re.S).groups()

                self.assertIsNone(self.weighed('rcpt', int(code), text)[2])

    def test_the_same_advice_stands_in_a_problem_once(self):
        reply = '%s; advice: wait'

        text = smtpproxy.problems({'a@b': reply % '451 x', 'c@d': '550 no',
                                   'e@f': reply % '451 y'})

        self.assertEqual('451 x for <a@b>; 550 no for <c@d>; 451 y for <e@f>;'
                         ' advice: wait', text)


class Table(unittest.TestCase):
    """The rows themselves."""

    def test_every_row_is_tested_by_a_reply(self):
        hit = {smtpproxy.advise(host, stage, reply)
               for _, _, stage, host, reply in known()}
        hit.update(smtpproxy.advise(HOST, 'rcpt', reply)
                   for reply in RECIPIENT)

        self.assertEqual(
            [], [row.pattern for row in smtpproxy.KNOWN_REPLIES
                 if row not in hit])

    def test_a_row_that_changes_the_kind_is_bound(self):
        for row in smtpproxy.KNOWN_REPLIES:
            if row.kind:
                with self.subTest(row.pattern):
                    self.assertTrue(
                        row.where or row.stages
                        or re.search(r'\\\.\S*\\\.', row.pattern))

    def test_rows_use_only_known_words(self):
        kinds = {'', 'later', 'never', 'account', 'person'}
        stages = set('connect tls hello login pop mail rcpt data dot '
                     'token'.split())
        for row in smtpproxy.KNOWN_REPLIES:
            with self.subTest(row.pattern):
                self.assertIn(row.kind, kinds)
                self.assertLessEqual(set(row.stages.split()), stages)
                self.assertTrue(row.pattern)
                self.assertNotRegex(row.pattern.replace(r'\S', ''), '[A-Z]')

    def test_sentences_read_well_in_a_log(self):
        sentences = [row.sentence for row in smtpproxy.KNOWN_REPLIES] + [
            provider.note for provider in smtpproxy.PROVIDERS]
        for sentence in sentences:
            with self.subTest(sentence):
                self.assertTrue(20 < len(sentence) <= 300)
                self.assertRegex(sentence, r'[\w)]$')
                self.assertNotRegex(sentence, r'\s\s|\n')

    def test_sentences_name_keys_that_exist(self):
        keys = set(smtpproxy.Account._fields) | set(
            smtpproxy.Config._fields) | {'smtprate'}
        for row in smtpproxy.KNOWN_REPLIES:
            for key in re.findall(r'\b(?:smtp|pop)[a-z]+\b(?=[ =])',
                                  row.sentence):
                with self.subTest(row.sentence):
                    self.assertIn(key, keys)


class Providers(unittest.TestCase):

    def test_each_has_what_an_account_needs(self):
        for provider in smtpproxy.PROVIDERS:
            with self.subTest(provider.name):
                self.assertIn((provider.smtpport, provider.smtpsecurity),
                              ((465, 'ssl'), (587, 'tls')))
                self.assertRegex(provider.smtphost, r'^[a-z0-9.-]+\.[a-z]+$')
                self.assertIn(provider.oauth, ('', 'microsoft', 'google'))

    def test_a_name_and_a_domain_mean_one_provider(self):
        for words in ([provider.name for provider in smtpproxy.PROVIDERS],
                      [domain for provider in smtpproxy.PROVIDERS
                       for domain in provider.domains.split()]):
            self.assertEqual(len(words), len(set(words)))


if __name__ == '__main__':
    unittest.main()
