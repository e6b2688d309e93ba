"""Beyond one machine: what ranks that share a vocabulary send, and a model of the time that they take."""
