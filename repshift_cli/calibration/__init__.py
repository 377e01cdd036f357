"""Choose or fit the metric on unlabelled inputs."""
