"""Linears fitted to what they read: the options of a fit, and the walk that measures inputs layer by layer. Who writes what came of it decides."""
