#!/bin/sh
# Take the init script through its whole life, once with start-stop-daemon and
# setsid in the PATH and once without, under every shell that is named:
#
#     .ci/init_test.sh dash "busybox sh"
#
# Each life works in a temporary folder with a copy of the program and ends at
# its first failure, naming it; all run at once, since most of it is waiting.
# BusyBox meets nothing but BusyBox applets and Python.

set -u
here=$(cd "$(dirname "$0")/.." && pwd)
python=$(python3 -c 'import sys; print(sys.executable)')
child=          # a process of the test itself, not the program

die() {
    echo "FAILED under $shell, $variant: $*" >&2
    echo "--- output of the last command" >&2
    cat "$tmp/out" "$tmp/err" >&2
    if [ -f "$app/smtpproxy.log" ]; then
        echo "--- log" >&2
        tail -n 20 "$app/smtpproxy.log" >&2
    fi
    exit 1
}

# expect CODE TEXT ACTION: run the init script, compare exit code and stdout,
# or stderr with "stderr: TEXT".
expect() {
    # shellcheck disable=SC2086  # "busybox sh" is two words
    (cd / && PATH=$tools exec $shell_path "$init" "$3") \
        >"$tmp/out" 2>"$tmp/err" </dev/null
    code=$?
    [ "$code" = "$1" ] || die "$3: exit code $code instead of $1"
    case $2 in
        stderr:*) grep -qF "${2#stderr: }" "$tmp/err" || die "$3: no $2" ;;
        *) grep -qF "$2" "$tmp/out" || die "$3: no '$2' on stdout" ;;
    esac
    if grep -q Traceback "$tmp/out" "$tmp/err"; then die "$3: a traceback"; fi
}

one_line() {
    [ "$(wc -l <"$tmp/err")" = 1 ] || die "more than one line on stderr"
}

# sender CODE ADDRESS: the proxy answers MAIL FROM:<ADDRESS> with CODE.
sender() {
    "$python" - "$port" "$1" "$2" <<'PY' || die "no $1 to MAIL FROM:<$2>"
import smtplib, sys, time
port, code, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
answer, end = None, time.monotonic() + 10
while answer != code and time.monotonic() < end:
    try:
        with smtplib.SMTP('127.0.0.1', port, 'localhost', timeout=5) as smtp:
            smtp.ehlo()
            answer = smtp.mail(address)[0]
    except OSError as err:
        answer = err
    time.sleep(0.1)
sys.exit(answer != code and 'answer: %s' % answer)
PY
}

# A zombie is dead; in a container it may stay for ever.
alive() {
    { [ -n "$(tr '\0' ' ' <"/proc/$1/cmdline")" ]; } 2>/dev/null
}

end_child() {
    [ -z "$child" ] || { kill "$child" && wait "$child"; } 2>/dev/null
    child=
}

pid_of_daemon() {
    pid=$(cat "$tmp/run.pid") || die "no pid file"
}

# write_ini ADDRESS PORT: an ini with one account.
write_ini() {
    printf '[config]\nport=%s\nhost=127.0.0.1\n[%s]\nsmtphost=127.0.0.1\n' \
        "$2" "$1" >"$app/smtpproxy.ini"
    chmod 600 "$app/smtpproxy.ini"
}

# set_variable NAME VALUE: edit the init script as its owner would.
set_variable() {
    sed -e "s|^$1=\"[^\"]*\"|$1=\"$2\"|" -e "s|^$1=[0-9][0-9]*|$1=$2|" \
        "$init" >"$init.new" && mv "$init.new" "$init"
}

install_all() {
    app="$tmp/smtp proxy"           # the space is the test
    init="$tmp/smtpproxy"
    mkdir "$app"
    for file in smtpproxy.py smtps.py MailHandler.py handlers; do
        [ -e "$here/$file" ] && cp -R "$here/$file" "$app"
    done
    port=$("$python" -c 'import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')
    write_ini default "$port"
    cp "$here/smtpproxy.init.d" "$init"
    set_variable DAEMON_PATH "$app"
    set_variable PIDFILE "$tmp/run.pid"
}

life() {
    expect 3 "not running" status
    expect 0 "not running" stop
    expect 7 "stderr: not running" reload
    expect 2 "stderr: usage:" dance

    expect 0 "started" start
    pid_of_daemon
    first=$pid
    sender 250 someone@example.org
    expect 0 "already running (pid $first)" start
    expect 0 "running (pid $first)" status
    [ "$(readlink "/proc/$first/cwd")" = "$app" ] ||
        die "its folder is not DAEMON_PATH"
    [ "$(readlink "/proc/$first/fd/0")" = /dev/null ] ||
        die "its stdin is not /dev/null"

    write_ini only@example.org "$port"
    expect 0 "reloading" reload
    sender 550 someone@example.org
    sender 250 only@example.org
    expect 0 "running (pid $first)" status

    expect 0 "started" restart
    pid_of_daemon
    [ "$pid" != "$first" ] || die "restart: still the same process"
    sender 250 only@example.org

    mv "$app/smtpproxy.ini" "$app/aside"
    expect 6 "stderr: smtpproxy.ini" restart
    one_line
    mv "$app/aside" "$app/smtpproxy.ini"
    write_ini only@example.org abc
    expect 6 "stderr: not restarted" restart
    grep -q smtpproxy.ini "$tmp/err" || die "restart: nothing about the ini"
    expect 0 "running (pid $pid)" status        # a mistake stopped nothing
    write_ini only@example.org "$port"

    expect 0 "stopped" stop
    alive "$pid" && die "stop: the process is still there"
    expect 0 "not running" stop
    expect 3 "not running" status
    expect 0 "started" restart
    pid_of_daemon

    kill -KILL "$pid"                           # a crash
    while alive "$pid"; do sleep 1; done
    expect 1 "dead" status
    expect 7 "stderr: not running" reload
    expect 0 "started" start                    # over a stale pid file
    pid_of_daemon
    sender 250 only@example.org
    expect 0 "stopped" stop

    # One that the script of before has started, which named the file.
    "$python" "$app/smtpproxy.py" --config "$app/smtpproxy.ini" \
        >"$tmp/out" 2>"$tmp/err" &
    child=$!
    echo "$child" >"$tmp/run.pid"
    sender 250 only@example.org
    expect 0 "running (pid $child)" status
    expect 0 "reloading" reload
    expect 0 "stopped" stop
    child=

    # A number that is another's by now: even an editor's with our script.
    "$python" -c 'import time; time.sleep(600)' "$app/smtpproxy.py" \
        --config "$app/smtpproxy.ini" --queue &
    child=$!
    for wrong in "$child" 999999999 "" "-1" "1 2" rubbish; do
        echo "$wrong" >"$tmp/run.pid"
        expect 1 "dead" status
        expect 7 "stderr: not running" reload
        expect 0 "not running" stop
        expect 3 "not running" status
    done
    echo "$child" >"$tmp/run.pid"
    expect 0 "started" start
    pid_of_daemon
    [ "$pid" != "$child" ] || die "start: kept the foreign number"
    expect 0 "stopped" stop
    alive "$child" || die "a foreign process was killed"
    end_child
}

mistakes() {
    write_ini default abc
    expect 1 "stderr: not started" start
    grep -q smtpproxy.ini "$tmp/err" || die "start: nothing about the broken ini"
    expect 3 "not running" status

    write_ini default "$port"
    mv "$app/smtpproxy.ini" "$app/aside"
    expect 6 "stderr: smtpproxy.ini" start
    one_line
    mv "$app/aside" "$app/smtpproxy.ini"

    set_variable PYTHON "$tmp/python9"
    expect 5 "stderr: python9" start
    one_line
    set_variable PYTHON python3

    set_variable DAEMON_PATH "$tmp/nowhere"
    expect 5 "stderr: DAEMON_PATH" start
    one_line
    set_variable DAEMON_PATH "$app"

    set_variable PIDFILE "$tmp/nowhere/run.pid"
    expect 4 "stderr: run.pid" start
    one_line
    set_variable PIDFILE "$tmp/run.pid"

    "$python" -c 'import socket, sys, time
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", int(sys.argv[1])))
s.listen()
print("taken", flush=True)
time.sleep(600)' "$port" >"$tmp/taken" &
    child=$!
    while [ ! -s "$tmp/taken" ] && alive "$child"; do sleep 1; done
    expect 1 "stderr: not started" start        # the port is taken
    grep -q "$port" "$tmp/err" || die "start: nothing about the port"
    end_child

    # A program that hangs: killed in the end, and said so.
    echo "import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)" >"$app/smtpproxy.py"
    set_variable START_WAIT 3
    set_variable STOP_WAIT 2
    expect 0 "started" start
    pid_of_daemon
    expect 0 "stderr: killed" stop
    alive "$pid" && die "stop: the hung process is still there"
    expect 3 "not running" status
}

# The commands the init script may use, and nothing else.
make_tools() {
    tools="$tmp/tools"
    mkdir "$tools"
    case $shell in
        busybox*) busybox --install -s "$tools" ;;
        *)
            for tool in cat rm sleep tr setsid start-stop-daemon; do
                full=$(command -v "$tool") && ln -s "$full" "$tools/$tool"
            done
            ;;
    esac
    ln -sf "$python" "$tools/python3"
}

# Leave nothing behind. The init script is the one that kills nobody else's.
# shellcheck disable=SC2086,SC2317  # "busybox sh"; called by a trap
clean_up() {
    {
        end_child
        PATH=$tools $shell_path "$init" stop
        rm -rf "$tmp"
    } >/dev/null 2>&1
}

one_life() {
    tmp=$(mktemp -d)
    trap clean_up EXIT
    trap 'exit 1' INT TERM
    # shellcheck disable=SC2086  # "busybox sh" is two words
    set -- $shell
    shell_path=$(command -v "$1") || { echo "no $1 here" >&2; exit 1; }
    shift
    shell_path="$shell_path $*"
    make_tools
    install_all
    [ "$variant" = with ] || rm -f "$tools/start-stop-daemon" "$tools/setsid"
    variant="$variant start-stop-daemon and setsid"
    life
    mistakes
    echo "ok: $shell, $variant"
}

[ $# -gt 0 ] || set -- dash "busybox sh"
lives=
for shell in "$@"; do
    for variant in with without; do
        (one_life) &
        lives="$lives $!"
    done
done
# shellcheck disable=SC2086  # a list of numbers
trap 'kill $lives; wait; exit 1' INT TERM
failed=0
for a_life in $lives; do
    wait "$a_life" || failed=1
done
exit $failed
