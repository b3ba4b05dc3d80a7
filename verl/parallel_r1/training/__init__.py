"""Cold-start SFT and RL on verl's trainers."""
