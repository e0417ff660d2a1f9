"""The recommender: packing of users, the network, the softmax loss."""
