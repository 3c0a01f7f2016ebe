#!/bin/bash
# One run on two nodes, which goes on where it stands if Slurm starts the job again: sbatch examples/slurm.sh
#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

run=runs/gpt-$SLURM_JOB_ID
if [ -d "$run" ]; then
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" instep train --resume "$run" --workers 8
else
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" instep train gpt --out "$run" --workers 8
fi
