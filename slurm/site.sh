# shellcheck shell=bash
# shellcheck disable=SC2034  # common.sh reads what is set here
# What differs between clusters: the one file here to edit. Every line is an example, none is needed
# where plain `sbatch slurm/train_64gpu.sh` works. Or leave it, and set HG_SITE to a file of yours.

# --- read by sbatch: `source slurm/site.sh` in the shell that you submit from --------------------
# export SBATCH_ACCOUNT=my-project SBATCH_PARTITION=gpu SBATCH_QOS=normal
# export SBATCH_SIGNAL=USR2@300     # where USR1 means something else

# --- Python: a virtual environment (default: .venv of the repository), modules, conda -------------
# module load cuda
# source ~/miniconda3/etc/profile.d/conda.sh && conda activate hg
# HG_PYTHON=$(command -v python)

# --- or a container, which needs no Slurm inside --------------------------------------------------
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
# HG_MPI=pmix                       # for prepare_data.sh: srun --mpi=list says what there is
# HG_MAX_RESTARTS=3                 # restarts without a new checkpoint before a job gives up
# HG_WAIT=120                       # seconds that ranks may outlive the first that ended
