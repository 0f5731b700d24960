#!/usr/bin/perl
# Net::SMTP.   net_smtp.pl MODE PORT CAFILE USER PASSWORD FROM TO <MAIL
use strict;
use warnings;
use Net::SMTP;

my ($mode, $port, $cafile, $user, $password, $from, $to) = @ARGV;
my %tls = (SSL_ca_file => $cafile, SSL_verifycn_name => 'localhost');
my $smtp = Net::SMTP->new('127.0.0.1', Port => $port, Timeout => 30,
                          SSL => $mode eq 'tls', %tls)
    or die "cannot connect: $@";

sub must {
    my ($step, $done) = @_;
    die "$step: " . $smtp->code . ' ' . $smtp->message unless $done;
}

must('STARTTLS', $smtp->starttls(%tls)) if $mode eq 'starttls';
must('AUTH', $smtp->auth($user, $password));
must('MAIL', $smtp->mail($from));
must('RCPT', $smtp->to($to));
binmode STDIN;
my @lines = <STDIN>;
must('DATA', $smtp->data(@lines));
must('QUIT', $smtp->quit);
