#!/bin/sh
### BEGIN INIT INFO
# Provides:          smtpproxy
# Required-Start:    $remote_fs $network
# Required-Stop:     $remote_fs $network
# Should-Start:      $named $time $syslog
# Should-Stop:       $named $syslog
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: SMTP proxy with POP-before-SMTP
# Description:       Takes mail from devices and programs of the local network
#                    and relays it through each sender's own mail account.
### END INIT INFO
#
# Copy to /etc/init.d/smtpproxy, make it executable, set DAEMON_PATH: a folder
# that belongs to root, since root runs what is in it (README.md has all steps).
# Needs a POSIX shell (dash, BusyBox ash) and cat, rm, sleep, tr. It does not
# use start-stop-daemon: small boxes lack it, its options differ between Debian
# and BusyBox, and it would see only a Python, not whose. Exit codes: LSB.

DAEMON_PATH="/opt/smtpproxy"        # folder of the installation, absolute
PYTHON="python3"                    # 3.8 or later; or a path: /opt/bin/python3
PIDFILE="/var/run/smtpproxy.pid"
START_WAIT=90                       # seconds; it may wait 60 for its address
STOP_WAIT=15                        # seconds; the program promises to need 10

PROGRAM="$DAEMON_PATH/smtpproxy.py"
CONFIG="$DAEMON_PATH/smtpproxy.ini"
ERRORS="${PIDFILE%.pid}.err"        # stderr of the last start: its last words
READY="${PIDFILE%.pid}.out"         # stdout: a line, once it serves

say() {
    echo "smtpproxy: $*"
}

fail() {    # code, text
    code=$1
    shift
    say "$*" >&2
    exit "$code"
}

# Print the command line of process $1; nothing for a zombie.
command_of() {
    if [ -r /proc/$$/cmdline ]; then
        { tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null
    else
        echo "$(ps -p "$1" -o args= 2>/dev/null) "      # BSD, or no /proc
    fi
}

# Set pid to what the pid file names, if that is our program. The file may be
# stale and its number somebody else's by now, even an editor's that has our
# script open: only the exact end of the command line of start() is ours, or of
# that of the script of 2.0 before, which named the file.
running() {
    pid=
    [ -r "$PIDFILE" ] && read -r pid <"$PIDFILE"
    case $pid in '' | *[!0-9]*) return 1 ;; esac
    case $(command_of "$pid") in
        *" -m smtpproxy --config $CONFIG ") return 0 ;;
        *" $PROGRAM --config $CONFIG ") return 0 ;;
    esac
    return 1
}

# What start needs.
check_installation() {
    [ -f "$PROGRAM" ] ||
        fail 5 "no smtpproxy.py in $DAEMON_PATH: set DAEMON_PATH in $0"
    command -v "$PYTHON" >/dev/null ||
        fail 5 "no $PYTHON: install Python 3.8 or later, or set PYTHON in $0"
    [ -f "$CONFIG" ] ||
        fail 6 "no $CONFIG: make it with smtpproxy.py --config $CONFIG --add"
}

start() {
    if running; then
        say "already running (pid $pid)"
        return 0
    fi
    check_installation
    cd "$DAEMON_PATH" || exit 5
    { true >"$PIDFILE" && true >"$ERRORS" && true >"$READY"; } 2>/dev/null ||
        fail 4 "cannot write $PIDFILE: are you root?"
    away=$(command -v setsid)
    (
        trap '' HUP     # where there is no setsid, outlive the terminal
        # shellcheck disable=SC2086  # no setsid, no word
        # -m takes what is in the current folder. Python keeps what it has
        # compiled of a module, not of a script: that saves 6 MB.
        exec $away "$PYTHON" -m smtpproxy --config "$CONFIG"
    ) </dev/null >"$READY" 2>"$ERRORS" &
    pid=$!
    echo "$pid" >"$PIDFILE"
    waited=0
    while [ ! -s "$READY" ] && [ "$waited" -lt "$START_WAIT" ] &&
        kill -0 "$pid" 2>/dev/null; do
        sleep 1
        waited=$((waited + 1))
    done
    cat "$ERRORS" >&2
    if ! running; then
        rm -f "$PIDFILE"
        fail 1 "not started"
    fi
    [ -s "$READY" ] || say "it is slow: see its log whether it serves" >&2
    say "started (pid $pid)"
}

# Wait until our process has gone, at most $1 seconds.
gone() {
    waited=0
    while running; do
        [ "$waited" -lt "$1" ] || return 1
        sleep 1
        waited=$((waited + 1))
    done
}

stop() {
    if ! running; then
        rm -f "$PIDFILE"
        say "not running"
        return 0
    fi
    kill -TERM "$pid" || ! running || exit 4
    if gone "$STOP_WAIT"; then
        say "stopped"
    else
        # No mail is lost: what was answered 250 is on disk.
        kill -KILL "$pid"
        gone 5 || fail 1 "cannot be stopped (pid $pid)"
        say "did not stop within $STOP_WAIT s, killed" >&2
    fi
    rm -f "$PIDFILE"
}

reload() {
    running || fail 7 "not running"
    kill -HUP "$pid" || exit 4
    say "reloading; its log says whether smtpproxy.ini was good"
}

status() {
    if running; then
        say "running (pid $pid)"
    elif [ -e "$PIDFILE" ]; then
        say "dead, but $PIDFILE exists"
        cat "$ERRORS" 2>/dev/null
        return 1
    else
        say "not running"
        return 3
    fi
}

case "$1" in
    start) start ;;
    stop) stop ;;
    restart)
        # A mistake must not stop what runs.
        check_installation
        "$PYTHON" "$PROGRAM" --config "$CONFIG" --check >/dev/null ||
            fail 6 "not restarted"
        stop
        start
        ;;
    reload | force-reload) reload ;;
    status) status ;;
    *)
        echo "usage: $0 start|stop|restart|reload|force-reload|status" >&2
        exit 2
        ;;
esac
