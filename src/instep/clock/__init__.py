"""Virtual time: an event loop, the times of workers and the network. No torch."""
