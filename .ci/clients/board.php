<?php
// Mail as a forum sends it: fgets in pieces of 255 bytes, replies read up to
// a blank behind the code, AUTH LOGIN only, nobody waits for the answer to
// QUIT.   board.php MODE PORT CAFILE USER PASSWORD FROM TO <MAIL
[, $mode, $port, $cafile, $user, $password, $from, $to] = $argv;

function reply($socket, $expected)
{
    $line = '';
    while (substr($line, 3, 1) !== ' ') {
        if (($line = fgets($socket, 256)) === false) {
            die_saying('no reply');
        }
    }
    if (substr($line, 0, 3) !== $expected) {
        die_saying("wanted $expected, got $line");
    }
}

function die_saying($text)
{
    fwrite(STDERR, $text . "\n");
    exit(1);
}

function say($socket, $line, $expected)
{
    fputs($socket, $line . "\r\n");
    reply($socket, $expected);
}

$context = stream_context_create(['ssl' => [
    'cafile' => $cafile, 'peer_name' => 'localhost']]);
$socket = stream_socket_client(
    ($mode === 'tls' ? 'ssl' : 'tcp') . "://127.0.0.1:$port",
    $errno, $error, 20, STREAM_CLIENT_CONNECT, $context);
if (!$socket) {
    die_saying($error);
}
reply($socket, '220');
say($socket, 'EHLO board', '250');
if ($mode === 'starttls') {
    say($socket, 'STARTTLS', '220');
    if (!stream_socket_enable_crypto(
            $socket, true, STREAM_CRYPTO_METHOD_TLS_CLIENT)) {
        die_saying('no TLS');
    }
    say($socket, 'EHLO board', '250');
}
say($socket, 'AUTH LOGIN', '334');
say($socket, base64_encode($user), '334');
say($socket, base64_encode($password), '235');
say($socket, "MAIL FROM:<$from>", '250');
say($socket, "RCPT TO: <$to>", '250');
say($socket, 'DATA', '354');
$mail = str_replace("\n", "\r\n", file_get_contents('php://stdin'));
fputs($socket, preg_replace('/^\./m', '..', $mail));
say($socket, '.', '250');
fputs($socket, "QUIT\r\n");
fclose($socket);
