# Shared by the download scripts, which source it: messages, clean stops, download and check of one file.
# Plain enough for bash 3.2 and the BSD tools of macOS. Needs $HERE, the folder of this file.

PYTHON=${PYTHON:-python3}
CHILD=       # the running command, stopped with us
SCRATCH=     # a working folder, removed when we stop
UNFINISHED=  # an unfinished file, removed when we stop

export GIT_TERMINAL_PROMPT=0  # git: fail instead of asking for a password

say() { printf '%s\n' "$*"; }

# die MESSAGE [STATUS]: 2 for the user's file or option, 1 for the network, the server or a missing program
die() { printf 'error: %s\n' "$1" >&2; exit "${2:-1}"; }

have() { command -v "$1" >/dev/null 2>&1; }

clean_up() {
  set +e  # a stopped child's status must not end this half-way
  if [ -n "$CHILD" ]; then kill "$CHILD" 2>/dev/null; wait "$CHILD" 2>/dev/null; fi
  if [ -n "$SCRATCH" ]; then rm -rf "$SCRATCH"; fi
  if [ -n "$UNFINISHED" ]; then rm -f "$UNFINISHED"; fi
}

on_signal() { printf '\ninterrupted; nothing half-written is left, run again to go on\n' >&2; exit "$1"; }

# In the background, because bash acts on a signal only between foreground commands: a stop is felt at once.
run() {
  local status=0
  "$@" &
  CHILD=$!
  wait "$CHILD" || status=$?
  CHILD=
  return "$status"
}

# start SCRIPT ARGUMENTS: --help, traps, data/, python
start() {
  local script=$1
  shift
  case ${1:-} in
    '') ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$script"; exit 0 ;;
    *) die "unknown argument '$1'; $(basename "$script") takes none but --help" 2 ;;
  esac
  trap clean_up EXIT
  trap 'on_signal 130' INT
  trap 'on_signal 143' TERM HUP
  have "$PYTHON" || die "'$PYTHON' not found; install Python 3.10 or newer, or name one: PYTHON=/path/to/python3"
  mkdir -p data || die "cannot make the folder data/ here ($PWD)"
}

# It takes a moment and is not interrupted: a Python that is just starting would answer Ctrl-C with a traceback.
datafiles() { (trap '' INT; exec "$PYTHON" "$HERE/datafiles.py" "$@"); }

pin() { datafiles pin "$1" "$2"; }

# check NAME PATH [--source ADDRESS] [--advice TEXT]: a message and status 1 unless PATH is what checksums.txt says
check() { datafiles check "$@"; }

# in_place NAME: true if data/NAME is there and right, false if absent; another file there is never overwritten
in_place() {
  [ -e "data/$1" ] || return 1
  check "$1" "data/$1" --advice "move data/$1 away, or delete it, and run again" || exit 2
}

# What curl's or wget's exit status $1 means; $2 is the HTTP status, if known.
reason() {
  case $1 in
    curl-22) say "the server answered with HTTP status $2" ;;
    curl-5 | curl-6 | curl-7 | wget-4) say "no connection (no network, a proxy, or a wrong address)" ;;
    curl-18 | curl-56) say "the connection broke off" ;;
    curl-23) say "cannot write to data/ (disk full?)" ;;
    curl-28) say "nothing came for too long" ;;
    curl-35 | curl-60 | wget-5) say "no secure connection (certificates)" ;;
    wget-8) say "the server answered with an error" ;;
    cp-*) say "cannot copy that file" ;;
    *) say "it failed with $1" ;;
  esac
}

# transfer ADDRESS FOLDER: one download to FOLDER/file with what is there; sets HOW (tool and exit status) and CODE
# (HTTP status)
transfer() {
  local status=0 shown=-s
  CODE=
  [ ! -t 2 ] || shown=-#
  case $1 in
    file://*) run cp "${1#file://}" "$2/file" 2>/dev/null || status=$?; HOW=cp-$status ;;
    *)
      if have curl; then
        run curl "$shown" -f -L --connect-timeout 20 --retry 2 --speed-limit 1 --speed-time 60 -w '%{http_code}' \
          -o "$2/file" "$1" >"$2/code" || status=$?
        CODE=$(cat "$2/code")
        HOW=curl-$status
      elif have wget; then
        run wget -q -t 3 -T 60 -O "$2/file" "$1" || status=$?
        HOW=wget-$status
      else
        die "neither curl nor wget was found; install one of them"
      fi
      ;;
  esac
  return "$status"
}

# fetch NAME ADDRESS VARIABLE: download data/NAME and check it; in a folder of its own until it is right
fetch() {
  local else_="or set $3 to the address of a mirror's folder;
              or get the file elsewhere, copy it to data/$1 and run again"
  SCRATCH=data/.$1.part
  rm -rf "$SCRATCH"  # what a killed run may have left
  mkdir "$SCRATCH" || die "cannot write to data/ here ($PWD)"
  say "downloading $2"
  transfer "$2" "$SCRATCH" || die "$1: could not download $2
  found:      $(reason "$HOW" "$CODE")
  what to do: check network and address and run again, what is in data/ already is kept;
              $else_"
  check "$1" "$SCRATCH/file" --source "$2" --advice "open the address in a browser to see what is there;
              $else_" || exit 1
  mv "$SCRATCH/file" "data/$1" || die "cannot write data/$1"
  rm -rf "$SCRATCH"
  SCRATCH=
}
