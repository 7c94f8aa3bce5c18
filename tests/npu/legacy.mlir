// The spellings of 2025: four columns in the name, the sequence in aiex, a shim channel by column.
module {
  aie.device(npu1_4col) {
    func.func private @work(memref<16xi8>, memref<16xi8>)
    %shim = aie.tile(0, 0)
    %mem = aie.tile(0, 1)
    %core = aie.tile(0, 2)
    aie.objectfifo @in(%shim, {%mem}, [2, 3]) : !aie.objectfifo<memref<16xi8>>
    aie.objectfifo @fwd(%mem, {%core dimensionsFromStream [<size = 4, stride = 4>, <size = 4, stride = 1>]}, 3 : i32) : !aie.objectfifo<memref<16xi8>>
    aie.objectfifo.link [@in] -> [@fwd] ([] [])
    aie.objectfifo @out(%core, {%shim}, 2 : i32) {via_DMA = true} : !aie.objectfifo<memref<16xi8>>
    aie.objectfifo @seed(%core, {%mem}, 1 : i32) : !aie.objectfifo<memref<4xi8>> = [dense<[1, 2, 3, 4]>]
    aie.core(%core) {
      %c0 = arith.constant 0 : index
      %c1 = arith.constant 1 : index
      %c8 = arith.constant 8 : index
      scf.for %i = %c0 to %c8 step %c1 {
        %sv = aie.objectfifo.acquire @fwd(Consume, 2) : !aie.objectfifosubview<memref<16xi8>>
        %s = aie.objectfifo.subview.access %sv[1] : !aie.objectfifosubview<memref<16xi8>> -> memref<16xi8>
        %dv = aie.objectfifo.acquire @out(Produce, 1) : !aie.objectfifosubview<memref<16xi8>>
        %d = aie.objectfifo.subview.access %dv[0] : !aie.objectfifosubview<memref<16xi8>> -> memref<16xi8>
        %e = aie.objectfifo.acquire @seed(Produce, 1) : !aie.objectfifosubview<memref<4xi8>>
        func.call @work(%s, %d) : (memref<16xi8>, memref<16xi8>) -> ()
        aie.objectfifo.release @seed(Produce, 1)
        aie.objectfifo.release @fwd(Consume, 2)
        aie.objectfifo.release @out(Produce, 1)
      }
      aie.end
    } {link_with = "work.o"}
    aie.shim_dma_allocation @extra(S2MM, 1, 0)
    aiex.runtime_sequence(%a : memref<256xi8>, %unused : memref<4xi32>, %b : memref<128xi8>) {
      aiex.npu.dma_memcpy_nd(0, 0, %a[0, 0, 0, 0][1, 1, 1, 256][0, 0, 0, 1]) {id = 0 : i64, metadata = @in} : memref<256xi8>
      aiex.npu.dma_memcpy_nd(0, 0, %b[0, 0, 0, 0][1, 1, 1, 128][0, 0, 0, 1]) {id = 1 : i64, metadata = @out} : memref<128xi8>
      aiex.npu.dma_wait {symbol = @out}
    }
  } {sym_name = "main"}
}
