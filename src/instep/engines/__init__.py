"""What runs workers: `lockstep` (every worker in every update, no server), on processes of this machine."""
