// Prints what AMD's XRT library finds in an xclbin. For Debian's libxrt-dev:
// g++ -std=c++17 -I/usr/include/xrt xrt_dump.cpp -o xrt_dump -lxrt_coreutil -luuid
#include <experimental/xrt_xclbin.h>

#include <iostream>

int main(int, char** argv) {
  const xrt::xclbin file{std::string(argv[1])};
  std::cout << std::hex << "uuid " << file.get_uuid().to_string() << "\n";
  for (const auto& memory : file.get_mems())
    std::cout << "memory " << memory.get_index() << " " << memory.get_tag() << " base "
              << memory.get_base_address() << " KiB " << memory.get_size_kb() << " used "
              << memory.get_used() << " type " << static_cast<int>(memory.get_type()) << "\n";
  for (const auto& kernel : file.get_kernels()) {
    std::cout << "kernel " << kernel.get_name() << "\n";
    for (const auto& argument : kernel.get_args())
      std::cout << "argument " << argument.get_index() << " " << argument.get_name() << " offset "
                << argument.get_offset() << " size " << argument.get_size() << " type "
                << argument.get_host_type() << "\n";
    for (const auto& instance : kernel.get_cus()) {
      std::cout << "instance " << instance.get_name() << "\n";
      for (const auto& argument : instance.get_args())
        for (const auto& memory : argument.get_mems())
          std::cout << "connection " << argument.get_name() << " " << memory.get_tag() << "\n";
    }
  }
}
