cd /root/td; PYTHONPATH=/root/td OMP_NUM_THREADS=1 SYNTHMED_HOME=/root/twod/home /work/main/.venv/bin/python -m synthmed "$@"
