"""`pit-jax doctor`: is this machine, are its devices, hosts and storage, ready for a run?"""
