# Sourced by the templates inside a job, after NAME and LOGS: Python, the container, srun's defaults, the job's end,
# and what follows an exit code. Whatever is exported already stays. Modules and network settings of a site go into
# slurm/site.sh. Nothing here runs inside a container, where there is no scontrol; MASTER_ADDR and MASTER_PORT are
# not set: every rank derives the same ones from Slurm's variables.

# A source without arguments sees those of the job: the flags behind the template's name win over NAME and LOGS.
run_folder() {
    local name="${NAME:-}" logs="${LOGS:-./logs}"
    while [ $# -gt 0 ]; do
        case "$1" in
            --name=*) name="${1#*=}" ;;
            --name) name="${2:-}" ;;
            --logs=* | --logs-dir=*) logs="${1#*=}" ;;
            --logs | --logs-dir) logs="${2:-}" ;;
        esac
        shift
    done
    [ -z "$name" ] || realpath -m -- "$logs/$name"
}

# Complete checkpoints only: a start that adds none has not brought the run forward.
checkpoints() {
    [ -z "$RUN_FOLDER" ] || ls -d "$RUN_FOLDER"/checkpoints/*/manifest.json 2>/dev/null
}

site="${CLIPYARD_SITE:-slurm/site.sh}"
if [ -f "$site" ]; then source "$site"; fi
RUN_FOLDER="$(run_folder "$@")"
CHECKPOINTS_BEFORE="$(checkpoints)"
HISTORY="$RUN_FOLDER/slurm.log"

# Loader workers do not start in this folder; an installed checkout must not be imported instead.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ -z "${CONTAINER_IMAGE:-}" ] && [ -x "${CLIPYARD_VENV:-.venv}/bin/python" ]; then
    PATH="$(cd "${CLIPYARD_VENV:-.venv}/bin" && pwd):$PATH"
    export PATH
fi

# Since 22.05 srun no longer takes --cpus-per-task from the batch job, and binds each rank to one core.
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"
# Ranks that have saved end within seconds of each other, not at once: killed at the first of them, as some sites
# have it, the others would turn 75 into a failure.
export SLURM_KILL_BAD_EXIT="${SLURM_KILL_BAD_EXIT:-0}"
# When one rank has ended, by whatever cause, the others get this many seconds: no one waits for a dead rank's NCCL.
export SLURM_WAIT="${SLURM_WAIT:-120}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Unix seconds at which Slurm ends the job; the run saves in time, even if no signal comes.
if [ -z "${CLIPYARD_END_TIME:-}" ]; then
    end=$(squeue -h -j "${SLURM_JOB_ID:-0}" -o %e 2>/dev/null) || end=
    case "$end" in [0-9]*) CLIPYARD_END_TIME=$(date -d "$end" +%s) && export CLIPYARD_END_TIME ;; esac
fi
# Ranks that hang are ended two minutes before the job is: a job that meets its time limit is never requeued.
minutes=$(((${CLIPYARD_END_TIME:-0} - $(date +%s) - 120) / 60))
if [ "$minutes" -ge 1 ]; then export SLURM_TIMELIMIT="${SLURM_TIMELIMIT:-$minutes}"; fi

# In a container Python is the image's. The ranks see the code and the runs where they are outside.
CONTAINER=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
    mounts="$PWD:$PWD"
    if [ -n "$RUN_FOLDER" ]; then
        runs="$(dirname "$RUN_FOLDER")"
        mkdir -p "$runs"
        mounts+=",$runs:$runs"
    fi
    # pyxis lets the image's variables win over the job's, but for those that are named.
    kept="$(compgen -e | grep -E '^(NCCL|TORCH|FI|UCX|OMP)_|^(MASTER_ADDR|MASTER_PORT|PYTHONPATH)$' | paste -sd, -)"
    CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
        --container-workdir="$PWD" --container-env="$kept")
fi

# USR2 is for the ranks; a batch script that gets it too must live to see their exit code.
trap : USR2

# fruitless CODE WHOSE: notes this end in the run's slurm.log, and says how many in a row ended so without a new
# checkpoint, preemptions (75) and failures apart. WHOSE limits the count to lines with that text.
fruitless() {
    local kind=failed progress=no
    [ "$1" != 75 ] || kind=preempted
    [ "$(checkpoints)" = "$CHECKPOINTS_BEFORE" ] || progress=yes
    if [ -z "$RUN_FOLDER" ] || ! mkdir -p "$RUN_FOLDER" 2>/dev/null || ! echo "$(date +%FT%T) job=$SLURM_JOB_ID" \
        "restart=${SLURM_RESTART_COUNT:-0} nodes=${SLURM_JOB_NODELIST:-} $kind exit=$1 checkpoint=$progress" \
        2>/dev/null >>"$HISTORY"; then
        echo $((${SLURM_RESTART_COUNT:-0} + 1)) # no folder to count in: every start counts
        return
    fi
    tac "$HISTORY" | awk -v whose="$2" -v kind="$kind" '
        !index($0, whose) || /checkpoint=yes|given-up|submitted/ { exit }
        index($0, " " kind " ") { count++ }
        END { print count + 0 }'
}

# again CODE WHOSE: whether another start makes sense, and says why or why not. A node lost at night is worth another
# start, a crash that comes back at once is not. A preempted run has saved every step it made: with no new checkpoint
# it made none.
again() {
    local count limit name
    count=$(fruitless "$1" "$2")
    if [ "$1" = 75 ]; then limit="${MAX_RESTARTS:-10}" name=MAX_RESTARTS; else limit="${RETRIES:-3}" name=RETRIES; fi
    if [ "$count" -gt "$limit" ]; then
        echo "exit code $1: no new checkpoint in $count starts in a row, $name=$limit: giving up; see $RUN_FOLDER/train.log"
        [ -z "$RUN_FOLDER" ] || echo "$(date +%FT%T) job=$SLURM_JOB_ID given-up" 2>/dev/null >>"$HISTORY"
        return 1
    fi
    if [ "$1" = 75 ]; then echo -n "preempted and saved"; else echo -n "exit code $1"; fi
    if [ "$count" = 0 ]; then echo -n ", with a new checkpoint"; else echo -n ", without a new checkpoint ($count of $limit)"; fi
}

# finish CODE: puts the job back into the queue, unless the run is complete (0) or its command wrong (2).
finish() {
    case "$1" in 0 | 2) exit "$1" ;; esac
    if again "$1" "job=$SLURM_JOB_ID "; then
        echo ": requeue of job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID" || echo "no requeue here: submit again, or as a chain (scripts.submit --chain, slurm/chained.sbatch)"
    fi
    exit "$1"
}

# finish_link CODE: the same in a chain, whose next job waits already; what is left is cancelled if there is no more to do.
finish_link() {
    case "$1" in
        0 | 2) cancel_links ;;
        *) if again "$1" "job="; then echo ": the next job of the chain goes on"; else cancel_links; fi ;;
    esac
    exit "$1"
}

cancel_links() {
    scancel --state=PENDING --name="$SLURM_JOB_NAME" --user="$(id -un)" || echo "cancel the rest of the chain"
}

# From here on a template's misspelt variable is an error; modules of a site may not bear that.
set -u
