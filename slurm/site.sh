# shellcheck shell=bash
# shellcheck disable=SC2034  # common.sh reads what is set here
# Settings of a cluster: the only file here to edit. Every line is an example; none is needed if
# plain `sbatch slurm/train_64gpu.sh` works. Or leave this file unchanged and set HG_SITE to yours.

# --- for sbatch: `source slurm/site.sh` in the shell from which you submit ------------------------
# export SBATCH_ACCOUNT=my-project SBATCH_PARTITION=gpu SBATCH_QOS=normal
# export SBATCH_SIGNAL=USR2@300     # if USR1 has another meaning

# --- Python: a virtual environment (default: .venv of the repository), modules, conda -------------
# module load cuda
# source ~/miniconda3/etc/profile.d/conda.sh && conda activate hg
# HG_PYTHON=$(command -v python)

# --- or a container, without Slurm inside ---------------------------------------------------------
# pyxis and enroot:
# HG_SRUN=(--container-image="$HOME/hg_scale.sqsh" --container-mounts=/scratch:/scratch,/home:/home)
# HG_PYTHON=python3
# apptainer (slurm/container.def):
# HG_CONTAINER=(apptainer exec --nv --bind /scratch "$HOME/hg_scale.sif")
# HG_PYTHON=python3

# --- network: the interface of the fast network, by name ------------------------------------------
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# --- disks and MPI --------------------------------------------------------------------------------
# HG_SCRATCH=/local/scratch         # node-local, for compiled kernels (default: /tmp)
# HG_MPI=pmix                       # for prepare_data.sh; srun --mpi=list prints the choices
# HG_MAX_RESTARTS=3                 # restarts without a new checkpoint before a job gives up
# HG_WAIT=120                       # seconds that ranks have to exit after the first
