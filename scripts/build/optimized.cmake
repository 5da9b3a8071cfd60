# Included by ggml's project() in a build for tests, so that ggml is optimized as in any build, whatever the rest is.
set(CMAKE_C_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
