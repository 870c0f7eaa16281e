"""Spiking: neurons, synapses, delays, connections and encoders, and one step in time of an equation."""
