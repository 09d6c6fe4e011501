# Functions of the download scripts, which set HERE to this folder and source this file. For bash 3.2 or newer.

PYTHON=${PYTHON:-python3}
CHILD='' SCRATCH='' UNFINISHED=''  # the running command, a working folder, an incomplete file: all end with the script
export GIT_TERMINAL_PROMPT=0  # git fails instead of asking for a password

say() { printf '%s\n' "$*"; }

# die MESSAGE [STATUS]: 2 for a wrong file or option of the user; 1 for network, server, disk or a missing program
die() { printf 'error: %s\n' "$1" >&2; exit "${2:-1}"; }

have() { command -v "$1" >/dev/null 2>&1; }

clean_up() {
  set +e
  if [ -n "$CHILD" ]; then kill "$CHILD" 2>/dev/null; wait "$CHILD" 2>/dev/null; fi
  rm -rf "$SCRATCH" "$UNFINISHED"
}

stopped() { printf '\ninterrupted: incomplete files were removed; run the command again to continue\n' >&2; exit "$1"; }

# start ARGUMENTS: handle --help and signals; look for Python; make data/
start() {
  case ${1:-} in
    '') ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
    *) die "unknown argument '$1'; the only one is --help" 2 ;;
  esac
  trap clean_up EXIT
  trap 'stopped 130' INT
  trap 'stopped 143' TERM HUP
  have "$PYTHON" || die "'$PYTHON' not found; install Python 3.10 or newer, or name it: PYTHON=/path/to/python3"
  mkdir -p data || die "cannot make the folder data/ in $PWD"
}

# Run a command in the background and wait for it: bash handles a signal at once only while it waits.
run() {
  local status=0
  "$@" &
  CHILD=$!
  wait "$CHILD" || status=$?
  CHILD=
  return "$status"
}

# Commands of datafiles.py. Ctrl-C takes effect after them: they are short, and a starting Python answers it badly.
datafiles() { (trap '' INT; exec "$PYTHON" "$HERE/datafiles.py" "$@"); }

# in_place NAME: succeed if data/NAME is correct, fail if it is absent, end the script if it is another file
in_place() {
  [ -e "data/$1" ] || return 1
  datafiles check "$1" "data/$1" --advice "move or delete data/$1 and run again" || exit 2
  say "data/$1 is in place"
}

# download ADDRESS FILE: the programs print their own errors
download() {
  local progress=-s
  [ ! -t 2 ] || progress=-#
  case $1 in file://*) run cp "${1#file://}" "$2"; return ;; esac
  if have curl; then
    run curl "$progress" -S -f -L --connect-timeout 20 --retry 2 --speed-limit 1 --speed-time 60 -o "$2" "$1"
  elif have wget; then
    run wget -nv -t 3 -T 60 -O "$2" "$1"
  else
    die "neither curl nor wget was found; install one of them"
  fi
}

# fetch NAME ADDRESS VARIABLE: download data/NAME; it gets that name only after the check
fetch() {
  local otherwise="or set $3 to the address of a mirror's folder;
              or copy the file to data/$1 yourself and run again"
  UNFINISHED=data/.$1.part
  : >"$UNFINISHED" || die "cannot write to data/ in $PWD"
  say "downloading $2"
  download "$2" "$UNFINISHED" || die "$1: could not download $2
  found:      the message above
  what to do: check the network, the proxy and the address and run again, complete files are kept;
              $otherwise"
  datafiles check "$1" "$UNFINISHED" --source "$2" --advice "open the address in a browser to see what is there;
              $otherwise" || exit
  mv "$UNFINISHED" "data/$1"
}
