// Two devices of one file: the first loads the second, runs its sequence, and programs registers.
module {
  aie.device(npu2) @main {
    aie.runtime_sequence @sequence(%data : memref<64xi32>) {
      aiex.npu.load_pdi {device_ref = @add}
      aiex.configure @add {
        %cut = memref.subview %data[4] [32] [1] : memref<64xi32> to memref<32xi32, strided<[1], offset: 4>>
        %part = memref.reinterpret_cast %cut to offset: [0], sizes: [32], strides: [1] : memref<32xi32, strided<[1], offset: 4>> to memref<32xi32>
        aiex.run @twice(%part) : (memref<32xi32>)
      }
    }
  }
  aie.device(npu2) @add {
    %shim = aie.tile(0, 0)
    %core = aie.tile(0, 2)
    %a = aie.buffer(%core) {initial_value = dense<[1, 2, 3, 4]> : tensor<4xi32>} : memref<4xi32>
    %a_1 = aie.buffer(%core) : memref<4xi32>
    %free = aie.lock(%core, 0) {init = 2 : i32}
    %full = aie.lock(%core, 1) {init = 0 : i32}
    aie.flow(%shim, DMA : 0, %core, DMA : 0)
    aie.core(%core) {
      aie.use_lock(%full, AcquireGreaterEqual, 2)
      memref.copy %a, %a_1 : memref<4xi32> to memref<4xi32>
      aie.use_lock(%free, Release, 2)
      aie.end
    }
    aie.runtime_sequence @twice(%given : memref<32xi32>) {
      aiex.npu.writebd {column = 0 : i32, row = 0 : i32, bd_id = 3 : i32, buffer_length = 8 : i32, buffer_offset = 0 : i32, valid_bd = 1 : i32, enable_packet = 0 : i32, out_of_order_id = 0 : i32, packet_id = 0 : i32, packet_type = 0 : i32, d0_size = 0 : i32, d0_stride = 0 : i32, d1_size = 0 : i32, d1_stride = 0 : i32, d2_size = 0 : i32, d2_stride = 0 : i32, iteration_current = 0 : i32, iteration_size = 0 : i32, iteration_stride = 0 : i32, next_bd = 0 : i32, use_next_bd = 0 : i32, lock_rel_val = 0 : i32, lock_rel_id = 0 : i32, lock_acq_enable = 0 : i32, lock_acq_val = 0 : i32, lock_acq_id = 0 : i32, d0_zero_before = 0 : i32, d1_zero_before = 0 : i32, d2_zero_before = 0 : i32, d0_zero_after = 0 : i32, d1_zero_after = 0 : i32, d2_zero_after = 0 : i32}
      aiex.npu.address_patch {addr = 118884 : ui32, arg_idx = 0 : i32, arg_plus = 0 : i32}
      aiex.npu.push_queue(0, 0, MM2S : 0) {issue_token = true, repeat_count = 0 : i32, bd_id = 3 : i32}
      %in = aiex.dma_configure_task(%core, S2MM, 0) {
        aie.dma_bd(%a : memref<4xi32>, 0, 4) {bd_id = 0 : i32}
        aie.next_bd ^second
      ^second:
        aie.dma_bd(%a_1 : memref<4xi32>, 0, 4) {bd_id = 1 : i32}
        aie.end
      } {issue_token = true}
      aiex.dma_start_task(%in)
      aiex.dma_await_task(%in)
      aiex.npu.sync {column = 0 : i32, row = 0 : i32, direction = 1 : i32, channel = 0 : i32, column_num = 1 : i32, row_num = 1 : i32}
    }
  }
}
