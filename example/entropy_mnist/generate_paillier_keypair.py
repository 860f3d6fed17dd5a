"""Makes the follower's keys in the working folder: public_key.json, which the leader gets too, and private_key.json.

    python generate_paillier_keypair.py [--bits 3072] [--fast] [--force]

It is ``efl keygen``.
"""

from efl.cli.keygen import keygen

if __name__ == "__main__":
    keygen()
