"""The Vulkan backend: GLSL sources in `shaders/`, SPIR-V modules in the package, their runtime."""
