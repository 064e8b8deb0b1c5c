# Sourced by the templates inside a job: Python, srun's defaults, the job's end, what follows exit code 75.
# Whatever is exported already stays. Modules and network settings of a site go into slurm/site.sh.
# MASTER_ADDR and MASTER_PORT are not set here: every rank derives the same ones from Slurm's variables.

if [ -f slurm/site.sh ]; then source slurm/site.sh; fi
if [ -x "${CLIPYARD_VENV:-.venv}/bin/python" ]; then
    PATH="$(cd "${CLIPYARD_VENV:-.venv}/bin" && pwd):$PATH"
    export PATH
fi

# Since 22.05 srun no longer takes --cpus-per-task from the batch job, and binds each rank to one core.
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"
# When one rank has ended, the others get this many seconds before srun ends them.
export SLURM_WAIT="${SLURM_WAIT:-300}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Unix seconds at which Slurm ends the job; the run saves in time, even if no signal comes.
if [ -z "${CLIPYARD_END_TIME:-}" ]; then
    end=$(squeue -h -j "${SLURM_JOB_ID:-0}" -o %e 2>/dev/null) || end=
    case "$end" in [0-9]*) CLIPYARD_END_TIME=$(date -d "$end" +%s) && export CLIPYARD_END_TIME ;; esac
fi

# USR2 is for the ranks; a batch script that gets it too must live to see their exit code.
trap : USR2

# finish CODE: 75 (preempted and saved) puts the job back into the queue; any other code ends it.
finish() {
    if [ "$1" = 75 ]; then
        echo "preempted and saved: requeue of job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID" || echo "no requeue here: submit again, or use slurm/chained.sbatch"
    fi
    exit "$1"
}

# finish_link CODE: the same in a chain, whose next job waits already; it is cancelled when there is no more to do.
finish_link() {
    case "$1" in
        0 | 2) scancel --state=PENDING --name="$SLURM_JOB_NAME" --user="$(id -un)" || echo "cancel the rest of the chain" ;;
    esac
    exit "$1"
}
