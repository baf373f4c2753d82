"""Search in videos: an index of moments by one model; queries by text, image, video or moment."""
