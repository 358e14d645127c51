#!/usr/bin/env bash
# A study on SLURM: Ray on the nodes of this job's allocation, and the study on all of them. Three minutes before the time
# limit the study ends in order, and the job queues itself again until the study is complete. docs/cluster/slurm.md
#
#     sbatch clusters/slurm.sh run STUDY --storage FOLDER         or confirm, landscape, ..., as one types after `lbstudy`
#
# FOLDER, and the environment below, must be seen by all nodes; a home directory usually is.
#
# FILL IN what a job may have here:
#SBATCH --nodes=2
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --job-name=lbstudy
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

# FILL IN: the environment that lbstudy is installed in.
# shellcheck source=/dev/null
source ~/lbstudy/bin/activate

log() { echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $*"; }

# Others use this cluster too. Who reaches Ray's ports runs code as you, unless Ray asks for a token; Ray counts what the
# machine has, so it is told what the job has; and where jobs share a node, each needs files and ports of its own.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
files=$(mktemp -d "/tmp/ray-$SLURM_JOB_ID-XXXXXX")
port=$((20000 + SLURM_JOB_ID % 5000 * 2))
head=(--head --port=0 --dashboard-port="$port" --ray-client-server-port="$((port + 1))")
each=(--block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="$files"
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --disable-usage-stats)

log "starting Ray"
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT # Ray, which SLURM does not end with the job everywhere
ray start "${head[@]}" "${each[@]}" >/dev/null &
until [[ -s $files/ray_current_cluster ]]; do # the last thing that a head does when it starts
    sleep 1
    kill -0 $! # it is still there
done
RAY_ADDRESS=$(<"$files/ray_current_cluster")
export RAY_ADDRESS
others=$((SLURM_JOB_NUM_NODES - 1)) # this script runs on the first node
if ((others)); then
    srun --relative=1 --nodes=$others --ntasks=$others --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
        ray start --address="$RAY_ADDRESS" "${each[@]}" >/dev/null &
fi

log "lbstudy $*"
lbstudy "$@" &
study=$!
# SLURM sends USR1 before the time limit. A job that is cancelled or preempted gets TERM, and so does the study itself.
trap 'log "the time limit is near"; again=yes; kill -TERM $study' USR1
trap : TERM
code=0
wait $study || code=$?
while kill -0 $study 2>/dev/null; do # a signal has ended `wait` before the study
    code=0
    wait $study || code=$?
done

log "the study has ended with exit code $code"
if [[ ${again:-} && $code != 0 ]]; then
    log "queued again; where that is refused, submit it again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
