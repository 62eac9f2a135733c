"""Experts on servers of their own: placement, directory, server, client.

A server holds some (layer, expert) weights and computes rows for them. The directory knows which
servers live, decides which of them holds what, and publishes that as a table. The client, an
`Experts` of `model.moe`, sends each step's rows where the table says, and to another copy when an
answer does not come. The directory is not on that path.
"""
