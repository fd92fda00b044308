-- Function that decides what a submit does to an existing record; put before the scripts that use it, behind lines.lua.

-- Returns the kind of reply for an existing record; or nil and the epoch of the new submit, if it replaces the record.
local function judge(stream, existing, epoch, digest, replaced, readable_version)
  local own_epoch = tonumber(epoch)
  if type(existing) == 'table' then return nil, own_epoch end -- of another type: it is overwritten
  local their_version, state, their_entry, their_epoch, sequence, their_digest =
    string.match(existing, '^(%d+) (%l+) (%S+) (%d+) (%d+) (%x+)[ +]*\n')
  if tonumber(their_version or string.match(existing, '^(%d%d?) %l') or 0) > tonumber(readable_version) then
    return 'newer'
  end
  if not state then return nil, own_epoch end -- unreadable
  if their_digest ~= digest then return 'collision' end
  if their_epoch == epoch then return 'new' end
  -- An unfinished task without an entry, as after the stream was deleted, would never run: it is replaced, but only
  -- after an instance that runs it had time to restore the entry.
  local unfinished = state == 'pending' or state == 'processing'
  if their_entry == IN_LINE and unfinished then
    if has_line(stream, existing) then return 'known' end
    if replaced ~= their_epoch then return 'gone' end
    return nil, math.max(own_epoch, tonumber(sequence) + 1)
  end
  local row = unfinished and redis.pcall('XRANGE', stream, their_entry, their_entry)
  if row and not row.err and #row == 1 then return 'known' end
  if unfinished and replaced ~= their_epoch then return 'gone' end
  if state == 'completed' and replaced ~= their_epoch then return 'known' end
  return nil, math.max(own_epoch, tonumber(sequence) + 1)
end
