<?php
// Mail as a mailing library sends it: it reads the list of extensions, takes
// the first AUTH mechanism that it knows, writes line by line, waits with
// select, and sends two mails over one connection with RSET in between.
//   mailer.php MODE PORT CAFILE USER PASSWORD FROM TO,TO <MAIL
class Mailer
{
    private $socket;
    private $extensions = [];

    public function __construct($url, $cafile)
    {
        $context = stream_context_create();
        stream_context_set_option($context, 'ssl', 'cafile', $cafile);
        stream_context_set_option($context, 'ssl', 'peer_name', 'localhost');
        $this->socket = stream_socket_client(
            $url, $errno, $error, 30, STREAM_CLIENT_CONNECT, $context);
        if (!$this->socket) {
            throw new RuntimeException($error);
        }
        stream_set_timeout($this->socket, 30);
        $this->expect([220]);
    }

    private function expect($codes)
    {
        $reply = '';
        do {
            $read = [$this->socket];
            $write = $except = null;
            if (!stream_select($read, $write, $except, 30)) {
                throw new RuntimeException('no reply after 30 s');
            }
            $line = fgets($this->socket, 512);
            if ($line === false) {
                throw new RuntimeException('connection closed');
            }
            $reply .= $line;
        } while (isset($line[3]) && $line[3] === '-');
        if (!in_array((int) $line, $codes, true)) {
            throw new RuntimeException("unexpected reply: $reply");
        }
        return $reply;
    }

    public function command($line, ...$codes)
    {
        fwrite($this->socket, "$line\r\n");
        return $this->expect($codes);
    }

    public function hello()
    {
        $this->extensions = [];
        $lines = explode("\n", trim($this->command('EHLO mailer', 250)));
        foreach (array_slice($lines, 1) as $line) {
            $words = explode(' ', trim(substr($line, 4)));
            $this->extensions[$words[0]] = array_slice($words, 1);
        }
    }

    public function startTls()
    {
        if (!isset($this->extensions['STARTTLS'])) {
            throw new RuntimeException('STARTTLS is not offered');
        }
        $this->command('STARTTLS', 220);
        if (!stream_socket_enable_crypto(
                $this->socket, true, STREAM_CRYPTO_METHOD_TLS_CLIENT)) {
            throw new RuntimeException('no TLS');
        }
    }

    public function login($user, $password)
    {
        $offered = $this->extensions['AUTH'] ?? [];
        foreach (['LOGIN', 'PLAIN'] as $mechanism) {
            if (in_array($mechanism, $offered, true)) {
                break;
            }
        }
        if ($mechanism === 'LOGIN') {
            $this->command('AUTH LOGIN', 334);
            $this->command(base64_encode($user), 334);
            $this->command(base64_encode($password), 235);
        } else {
            $this->command('AUTH PLAIN', 334);
            $this->command(base64_encode("\0$user\0$password"), 235);
        }
    }

    public function send($from, $to, $mail)
    {
        $this->command("MAIL FROM:<$from>", 250);
        $this->command("RCPT TO:<$to>", 250, 251);
        $this->command('DATA', 354);
        foreach (explode("\n", substr($mail, 0, -1)) as $line) {
            $dot = $line !== '' && $line[0] === '.' ? '.' : '';
            fwrite($this->socket, "$dot$line\r\n");
        }
        $this->command('.', 250);
        $this->command('RSET', 250);
    }

    public function quit()
    {
        $this->command('NOOP', 250);
        $this->command('QUIT', 221);
        fclose($this->socket);
    }
}

[, $mode, $port, $cafile, $user, $password, $from, $recipients] = $argv;
$mail = file_get_contents('php://stdin');
$mailer = new Mailer(
    ($mode === 'tls' ? 'ssl' : 'tcp') . "://127.0.0.1:$port", $cafile);
$mailer->hello();
if ($mode === 'starttls') {
    $mailer->startTls();
    $mailer->hello();
}
$mailer->login($user, $password);
foreach (explode(',', $recipients) as $to) {
    $mailer->send($from, $to, $mail);
}
$mailer->quit();
