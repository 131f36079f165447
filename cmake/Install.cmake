# For embedders: the library with its header (the CUDA library with its own), and a package file for find_package(interfuse).

if(NOT TARGET interfuse OR NOT EXISTS "${PROJECT_SOURCE_DIR}/csrc/interfuse.h")
  return()
endif()

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/interfuse")
install(FILES csrc/interfuse.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(TARGETS interfuse EXPORT interfuse-targets)
if(TARGET interfuse_cuda)
  install(FILES csrc/interfuse_cuda.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
  target_include_directories(interfuse_cuda INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  install(TARGETS interfuse_cuda EXPORT interfuse-targets)
endif()
install(EXPORT interfuse-targets NAMESPACE interfuse:: DESTINATION "${package_dir}")
configure_package_config_file(cmake/interfuse-config.cmake.in interfuse-config.cmake INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file(interfuse-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/interfuse-config.cmake" "${PROJECT_BINARY_DIR}/interfuse-config-version.cmake"
        DESTINATION "${package_dir}")
