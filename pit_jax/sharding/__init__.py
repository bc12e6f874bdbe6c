"""Meshes of devices, and the rules that lay named array axes out over them."""
