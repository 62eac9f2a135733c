"""A mixture of experts under load while its expert servers die, freeze or lose their network: who notices?"""
