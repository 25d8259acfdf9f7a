# Functions for guest jobs; read by every job as /rig.sh.

# mark NAME [TEXT]: tells the test, which waits for it, that the job got here.
mark() {
    echo "MARK $*" >&8
    echo "MARK $*"
}

# await [WORD]: waits for a line from the test (for that very WORD, when given) and leaves it in $REPLY.
await() {
    while read -r REPLY <&8; do
        [ $# = 0 ] && return 0
        [ "$REPLY" = "$1" ] && return 0
    done
    echo "the test closed the control port" >&2
    return 1
}

# wait_for SECONDS COMMAND…: repeats the command until it succeeds.
wait_for() {
    tries=$(($1 * 10))
    shift
    while ! "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { echo "never came true: $*" >&2; return 1; }
        sleep 0.1
    done
}
